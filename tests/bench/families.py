"""Decoding of LLaDA and SDAR beside a plain loop over the same backbone of transformers, on small random checkpoints.

The plain loop is what a script would do: whole canvases without a cache for LLaDA, a cache of finished blocks for SDAR,
the most confident masks first, no checks and no counts. Both must commit the same tokens.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from bench import Findings, Say
from bench.measure import interleave, ratios
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.families.llada import IN_BLOCK, PREFIX, TOP
from twotower_eval.engine.models import load_model
from twotower_eval.records import Prompt

HEADER = ("family", "batch", "plain loop", "ours", "ratio to the plain loop", "quartiles")
BATCH_SIZES = (1, 4)
SMALL, FULL = {"prompt": 128, "answer": 32}, {"prompt": 256, "answer": 128}  # tokens
BLOCK = 8
MASK_ID = 1000
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 1024,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


def run(*, rounds: int, full: bool, say: Say) -> Findings:
    """Time both loops interleaved; ValueError where they commit other tokens."""
    lengths = FULL if full else SMALL
    say(f"families: random checkpoints, prompts and answers of {lengths['answer']} tokens, a token a step, float32\n")
    rows, figures = [], []
    with tempfile.TemporaryDirectory() as name:
        for family, write, plain, decoder in (
            ("llada", write_llada, plain_llada, "low_confidence"),
            ("sdar", write_sdar, plain_sdar, "sdar"),
        ):
            model: Any = load_model(write(Path(name) / family), device="cpu", dtype="float32")
            options = {"block_length": BLOCK} if family == "llada" else {"strategy": "low_confidence_static"}
            for batch in BATCH_SIZES:
                figure = _measure(model, plain, make_decoder(model, decoder, **options), batch, lengths, rounds)
                ratio = figure["ratio"]
                wall = [f"{min(figure['wall_s'][arm]) * 1e3:.0f} ms" for arm in ("plain", "ours")]
                spread = f"{ratio['low']:.2f}–{ratio['high']:.2f}"
                rows.append((family, str(batch), *wall, f"{ratio['median']:.2f}x", spread))
                figures.append({"family": family, "batch": batch, **figure})
    return Findings(header=HEADER, rows=tuple(rows), summary={**lengths, "figures": figures})


def _measure(
    model: Any, plain: Callable[..., Tensor], decoder: Any, batch: int, lengths: dict[str, int], rounds: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    ids_BS = torch.randint(0, MASK_ID, (batch, lengths["prompt"]), generator=generator)
    prompts = [Prompt(id=str(i), token_ids=tuple(row)) for i, row in enumerate(ids_BS.tolist())]
    num = lengths["answer"]
    arms: dict[str, Callable[[], Any]] = {
        "plain": lambda: plain(model.backbone.inner, ids_BS, num),
        "ours": lambda: decoder.generate(prompts, max_new_tokens=num, eos_token_ids=()),
    }
    if arms["plain"]().tolist() != [list(one.token_ids) for one in arms["ours"]()]:
        raise ValueError(f"{model.checkpoint.family}: the loops commit other tokens: nothing to time")
    wall_s = interleave(arms, rounds)
    return {"wall_s": wall_s, "ratio": ratios(wall_s["plain"], wall_s["ours"])}


def _commit_surest(canvas_BG: Tensor, logits_BGV: Tensor, open_G: slice) -> None:
    """Commit the most confident mask of an open stretch, in place."""
    logits_BGV[..., MASK_ID] = -torch.inf
    probabilities_BG, tokens_BG = logits_BGV.softmax(-1).max(-1)
    masked_BG = torch.zeros_like(canvas_BG, dtype=torch.bool)
    masked_BG[:, open_G] = canvas_BG[:, open_G] == MASK_ID
    surest_B1 = probabilities_BG.masked_fill(~masked_BG, -torch.inf).argmax(1, keepdim=True)
    canvas_BG.scatter_(1, surest_B1, tokens_BG.gather(1, surest_B1))


@torch.inference_mode()
def plain_llada(inner: Any, ids_BS: Tensor, num: int) -> Tensor:
    """Answers (B, num): every step reads prompt and canvas whole, each token seeing all."""
    start, width = ids_BS.shape[1], ids_BS.shape[1] + num
    canvas_BS = torch.cat([ids_BS, torch.full((len(ids_BS), num), MASK_ID)], dim=1)
    seen = torch.ones(len(ids_BS), 1, width, width, dtype=torch.bool)
    for first in range(0, num, BLOCK):
        for _ in range(BLOCK):
            logits_BSV = inner(input_ids=canvas_BS, attention_mask=seen, use_cache=False).logits[:, start:].float()
            answer_BG = canvas_BS[:, start:]
            _commit_surest(answer_BG, logits_BSV, slice(first, first + BLOCK))
            canvas_BS[:, start:] = answer_BG
    return canvas_BS[:, start:]


@torch.inference_mode()
def plain_sdar(inner: Any, ids_BS: Tensor, num: int) -> Tensor:
    """Answers (B, num): prompt and finished blocks stand in a cache, each step reads one block."""
    from transformers import DynamicCache

    cache, made = DynamicCache(), []
    block_S = torch.arange(ids_BS.shape[1]) // BLOCK
    seen_SS = (block_S[:, None] >= block_S).expand(len(ids_BS), 1, -1, -1)
    inner.model(input_ids=ids_BS, attention_mask=seen_SS, past_key_values=cache, use_cache=True)
    for first in range(ids_BS.shape[1], ids_BS.shape[1] + num, BLOCK):
        block_BK = torch.full((len(ids_BS), BLOCK), MASK_ID)
        seen = torch.ones(len(ids_BS), 1, BLOCK, first + BLOCK, dtype=torch.bool)
        positions = torch.arange(first, first + BLOCK).expand_as(block_BK)
        fixed = {"attention_mask": seen, "position_ids": positions, "past_key_values": cache, "use_cache": True}
        for _ in range(BLOCK):
            logits_BKV = inner(input_ids=block_BK, **fixed).logits.float()
            cache.crop(-BLOCK)
            _commit_surest(block_BK, logits_BKV, slice(0, BLOCK))
        inner.model(input_ids=block_BK, **fixed)
        made.append(block_BK)
    return torch.cat(made, dim=1)


def _random(kind: str) -> Any:
    """A model of transformers with random weights; logits wide enough that no two tokens are equally likely."""
    import transformers

    config = getattr(transformers, f"{kind}Config")(**SIZES)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
    return model


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir()
    save_file({name: tensor.detach().clone() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def write_sdar(folder: Path) -> Path:
    """A small random SDAR in its public layout."""
    blocks = {"block_size": BLOCK, "mask_token_id": MASK_ID}
    return _write(folder, _random("Qwen3").state_dict(), {"model_type": "sdar", **SIZES, **blocks})


def write_llada(folder: Path) -> Path:
    """A small random LLaDA in its public layout."""
    top, inside = ({theirs: own for own, theirs in names.items()} for names in (TOP, IN_BLOCK))
    tensors = {}
    for name, tensor in _random("Llama").state_dict().items():
        bare = name.removesuffix(".weight")
        if bare in top:
            tensors[f"{PREFIX}{top[bare]}.weight"] = tensor
        else:
            _, _, number, part = bare.split(".", 3)
            tensors[f"{PREFIX}blocks.{number}.{inside[part]}.weight"] = tensor
    config = {
        "model_type": "llada",
        "mask_token_id": MASK_ID,
        "vocab_size": SIZES["vocab_size"],
        "embedding_size": SIZES["vocab_size"],
        "d_model": SIZES["hidden_size"],
        "mlp_hidden_size": SIZES["intermediate_size"],
        "n_layers": SIZES["num_hidden_layers"],
        "n_heads": SIZES["num_attention_heads"],
        "n_kv_heads": SIZES["num_key_value_heads"],
        "rms_norm_eps": SIZES["rms_norm_eps"],
        "rope_theta": SIZES["rope_theta"],
        "max_sequence_length": SIZES["max_position_embeddings"],
        "weight_tying": False,
    }
    return _write(folder, tensors, config)
