"""Tiny random checkpoints of every shipped diffusion family, in the layout that is published, and models of them.

A family's own page of keys is written down here once more, so that a loader that reads another layout is noticed.
"""

import functools
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import save_file
from tiny_models import Pieces
from torch import Tensor

from twotower_eval.engine.families.dit import DiT, Sizes
from twotower_eval.engine.families.llada2_moe import Network, Settings
from twotower_eval.engine.models import load_model

VOCAB, MASK = 40, 39
PIECES = ["a", "b", "ab", "ba", "aab", "\n", "", "c", "bc", "abc"]  # across tokens; an empty one is a special token
WORDS: dict[str, Any] = {  # sizes in the words of transformers
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "mask_token_id": MASK,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "partial_rotary_factor": 0.5,
    "routed_scaling_factor": 2.5,
}
LLADA: dict[str, Any] = {
    "model_type": "llada",
    "d_model": 32,
    "mlp_hidden_size": 48,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 4,
    "rope_theta": 10000.0,
    "max_sequence_length": 128,
    "vocab_size": VOCAB,
    "embedding_size": VOCAB,
    "mask_token_id": MASK,
}
LLADA_LAYER = {
    "attn_norm": (32,),
    "ff_norm": (32,),
    "q_proj": (32, 32),
    "k_proj": (32, 32),
    "v_proj": (32, 32),
    "attn_out": (32, 32),
    "ff_proj": (48, 32),
    "up_proj": (48, 32),
    "ff_out": (32, 48),
}
DIT: dict[str, Any] = {"vocab_size": VOCAB, "hidden_dim": 32, "n_blocks": 2, "n_heads": 4, "cond_dim": 8}
RADD: dict[str, Any] = {
    "tokens": VOCAB - 1,
    "model": {"hidden_size": 32, "n_blocks": 2, "n_heads": 4, "length": 128, "cond_dim": 8},
    "noise": {"type": "loglinear"},
    "training": {},
}


def _hugging_face(kind: str) -> dict[str, tuple[int, ...]]:
    config = getattr(transformers, f"{kind}Config")(**{k: v for k, v in WORDS.items() if k != "mask_token_id"})
    with torch.device("meta"):
        state = getattr(transformers, f"{kind}ForCausalLM")(config).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _llada() -> dict[str, tuple[int, ...]]:
    layers = {f"blocks.{n}.{part}.weight": shape for n in range(2) for part, shape in LLADA_LAYER.items()}
    top = {"wte.weight": (VOCAB, 32), "ln_f.weight": (32,), "ff_out.weight": (VOCAB, 32)}
    return {f"model.transformer.{name}": shape for name, shape in {**top, **layers}.items()}


def _llada2() -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        state = Network(Settings.read(Path(), {**WORDS, **EXPERTS})).state_dict()
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _e2d2() -> dict[str, tuple[int, ...]]:
    own = _hugging_face("Qwen3")
    decoder = {name: shape for name, shape in own.items() if "embed_tokens" not in name}
    both = (("encoder", own), ("decoder", decoder))
    return {f"backbone.{part}.{name}": shape for part, shapes in both for name, shape in shapes.items()}


def _dit(prefix: str, condition: int | None) -> dict[str, tuple[int, ...]]:
    state = DiT(Sizes(vocab_size=VOCAB, hidden_size=32, num_blocks=2, num_heads=4, condition=condition)).state_dict()
    return {prefix + name: tuple(tensor.shape) for name, tensor in state.items()}


@dataclass(frozen=True, kw_only=True)
class Made:
    """How a family's checkpoint is made: its config.json, and the names and shapes of its tensors."""

    config: dict[str, Any]
    shapes: Callable[[], dict[str, tuple[int, ...]]]
    decoders: tuple[tuple[str, dict[str, Any]], ...]  # that fit it, with parameters under which they differ
    eos_token_ids: tuple[int, ...] = ()
    changes: dict[str, Any] = field(default_factory=dict)  # attributes set on the loaded model: smaller blocks
    prompt_is_one: bool = False  # its tokens all see each other, so that reading it in parts is something else
    base: dict[str, Any] = field(default_factory=dict)  # base/config.json, of a family that needs one


LOW_CONFIDENCE: tuple[tuple[str, dict[str, Any]], ...] = (
    ("low_confidence", {}),
    ("low_confidence", {"block_length": 4, "threshold": 0.3}),
    ("low_confidence", {"block_length": 5, "factor": 0.8, "temperature": 0.8}),
    ("low_confidence", {"block_length": 4, "quotas": "scheduled", "commit_mask": True}),
    ("low_confidence", {"cfg_scale": 0.5}),
)
CACHED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("fast_dllm_v1", {"block_length": 4, "threshold": 0.3}),
    ("fast_dllm_v1", {"block_length": 4, "cache": "prefix", "factor": 1.0}),
    ("fast_dllm_v1", {"block_length": 4, "cache": "dual", "threshold": 0.3, "commit_mask": True}),
    ("fast_dllm_v1", {"block_length": 4, "cache": "dual", "extra_step": True, "temperature": 0.8}),
)
SDAR: tuple[tuple[str, dict[str, Any]], ...] = (
    ("sdar", {"threshold": 0.3}),
    ("sdar", {"strategy": "low_confidence_static", "steps": 2, "temperature": 0.8, "top_k": 9, "top_p": 0.9}),
    ("sdar", {"strategy": "sequential", "commit_mask": True}),
    ("sdar", {"quotas": "scheduled", "commit_mask": True}),
)
FAMILIES: dict[str, Made] = {
    "llada": Made(config=LLADA, shapes=_llada, decoders=(*LOW_CONFIDENCE, *CACHED)),
    "dream": Made(
        config={"model_type": "Dream", **WORDS},
        shapes=lambda: _hugging_face("Qwen2"),
        decoders=(
            ("dream", {}),
            ("dream", {"alg": "topk_margin", "steps": 4, "temperature": 0.8, "top_p": 0.9}),
            ("dream", {"alg": "origin", "commit_mask": True, "top_k": 9}),
            ("dream", {"alg": "maskgit_plus", "cfg_scale": 0.5}),
            ("low_confidence", {"block_length": 4, "threshold": 0.3}),
        ),
    ),
    "sdar": Made(
        config={"model_type": "sdar", "block_size": 4, **WORDS},
        shapes=lambda: _hugging_face("Qwen3"),
        decoders=SDAR,
    ),
    "fast_dllm_v2": Made(
        config={"model_type": "Fast_dLLM_Qwen", **WORDS},
        shapes=lambda: _hugging_face("Qwen2"),
        decoders=(
            ("fast_dllm_v2", {"small_block_size": 4, "threshold": 0.3}),
            ("fast_dllm_v2", {"small_block_size": 4, "threshold": 0.3, "use_block_cache": True}),
            ("fast_dllm_v2", {"small_block_size": 2, "temperature": 0.8, "commit_mask": True}),
            ("sdar", {"threshold": 0.3}),
        ),
        changes={"block_size": 8},
    ),
    "a2d_mdlm": Made(
        config={"model_type": "a2d-qwen3", **WORDS},
        shapes=lambda: _hugging_face("Qwen3"),
        decoders=(*LOW_CONFIDENCE, *CACHED),
    ),
    "a2d_bd3lm": Made(
        config={"model_type": "a2d-qwen3", **WORDS},
        shapes=lambda: _hugging_face("Qwen3"),
        decoders=SDAR,
        changes={"block_size": 4},
    ),
    "llada2_moe": Made(
        config={"model_type": "llada2_moe", **WORDS, **EXPERTS},
        shapes=_llada2,
        decoders=(
            ("llada2", {"threshold": 0.3}),
            ("llada2", {"threshold": 0.3, "eos_early_stop": True, "temperature": 0.8}),
            ("llada2", {"steps": 2, "commit_mask": True}),
        ),
        changes={"block_size": 4},
    ),
    "mdlm": Made(
        config={"model_type": "mdlm", "model_length": 128, **DIT},
        shapes=lambda: _dit("backbone.", 8),
        decoders=(
            ("ancestral", {"predictor": "ddpm", "steps": 6}),
            ("ancestral", {"predictor": "ddpm_cache", "steps": 6, "all_steps": True}),
            ("ancestral", {"predictor": "analytic", "steps": 6}),
            ("low_confidence", {"block_length": 4}),
        ),
    ),
    "bd3lm": Made(
        config={"model_type": "bd3lm", "model_length": 128, "block_size": 4, **DIT},
        shapes=lambda: _dit("backbone.", 8),
        decoders=(
            ("bd3lm", {}),
            ("bd3lm", {"first_hitting": False, "steps": 3}),
            ("bd3lm", {"top_p": 0.7, "drop_crossing": True}),
        ),
    ),
    "e2d2": Made(
        config={
            "model_type": "e2d2",
            "vocab_size": VOCAB,
            "mask_token_id": MASK,
            "block_size": 4,
            "backbone_config": {
                "_target_": "backbone_encoder_decoder.LLMasEncoderDecoder",
                "pretrained_model_name_or_path": "base",
            },
        },
        base={"model_type": "qwen3", **WORDS},
        prompt_is_one=True,
        shapes=_e2d2,
        decoders=(
            ("e2d2", {}),
            ("e2d2", {"threshold": 0.3, "align": False}),
            ("e2d2", {"strategy": "margin", "do_sample": True, "steps": 2}),
            ("e2d2", {"strategy": "posterior", "use_cache": False, "commit_mask": True}),
        ),
    ),
    "radd": Made(
        config=RADD,
        shapes=lambda: _dit("", None),
        decoders=(
            ("radd", {}),
            ("radd", {"method": "euler", "steps": 5, "half": True}),
            ("radd", {"method": "ordered"}),
            ("radd", {"top_p": 0.8, "commit_mask": True}),
            ("radd", {"top_k": 4, "all_steps": True}),
        ),
    ),
}


def write_family(family: str, folder: Path) -> Path:
    """A checkpoint of random weights, large enough that answers vary; the folder."""
    made, draw = FAMILIES[family], torch.Generator().manual_seed(3)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(made.config))
    if made.base:
        (folder / "base").mkdir(exist_ok=True)
        (folder / "base" / "config.json").write_text(json.dumps(made.base))
    drawn = {name: _drawn(name, shape, draw) for name, shape in made.shapes().items()}
    save_file(drawn, folder / "model.safetensors")
    return folder


def _drawn(name: str, shape: tuple[int, ...], draw: torch.Generator) -> Tensor:
    if name.endswith("inv_freq"):
        return 10000.0 ** (-torch.arange(0, 2 * shape[0], 2) / (2 * shape[0]))
    if "norm" in name or "ln_f" in name:
        return torch.ones(shape) if not name.endswith("bias") else torch.zeros(shape)
    # What the tokens are counts more than the noise level, which is the same everywhere.
    return torch.randn(shape, generator=draw) * (0.01 if "adaLN" in name else 0.4)


@functools.cache
def family_model(family: str) -> Any:
    """A model of random weights with a tokenizer of short pieces. Shared: do not change it."""
    with tempfile.TemporaryDirectory() as folder:
        model = cast(Any, load_model(write_family(family, Path(folder)), family=family))
    for name, value in FAMILIES[family].changes.items():
        setattr(model, name, value)
    model.tokenizer = Pieces([PIECES[token % len(PIECES)] for token in range(VOCAB)])
    return model
