"""Small networks of the other families: how each starts, what its loss is, and the layout in which it is exported.

All read rows of documents: prompt, answer, then EOS as filler. Shape letters: N rows, S columns, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from twotower_eval.engine.families.backbone import Backbone, new_backbone
from twotower_eval.engine.families.bd3lm import doubled_mask
from twotower_eval.engine.families.dit import DiT, Sizes, View, new_dit
from twotower_eval.engine.families.e2d2 import DECODER, E2D2, ENCODER, HEAD
from twotower_eval.engine.families.mdlm import PREFIX
from twotower_eval.miniature.blocks import FILLER_WEIGHT, PROMPT_WEIGHT
from twotower_eval.miniature.export import BOS_ID, EOS_ID, MASK_ID, PAD_ID, VOCABULARY

MAX_LENGTH = 1024  # tokens; any bound above the longest document with its answer
DIT_MASK_ID = len(VOCABULARY)  # MDLM's and BD3-LM's mask is the last entry of their vocabulary

ModelSizes = Mapping[str, int]
Network = Backbone | DiT | E2D2


@dataclass(frozen=True)
class Rows:
    """Documents as padded rows: ids (N, S), and of each row the columns where its prompt and its answer begin, and
    where the answer (behind its EOS) and the filler end."""

    ids_NS: Tensor
    start_N: Tensor
    prompt_N: Tensor
    told_N: Tensor
    filled_N: Tensor

    def to(self, device: torch.device) -> Rows:
        """The rows on a device."""
        parts = (self.ids_NS, self.start_N, self.prompt_N, self.told_N, self.filled_N)
        return Rows(*(part.to(device) for part in parts))

    @property
    def column_S(self) -> Tensor:
        """The number of every column."""
        return torch.arange(self.ids_NS.shape[1], device=self.ids_NS.device)

    @property
    def prompt_NS(self) -> Tensor:
        """Where a prompt stands."""
        return (self.column_S >= self.start_N[:, None]) & (self.column_S < self.prompt_N[:, None])

    @property
    def answer_NS(self) -> Tensor:
        """Where an answer or the filler behind it stands."""
        return (self.column_S >= self.prompt_N[:, None]) & (self.column_S < self.filled_N[:, None])

    @property
    def weight_NS(self) -> Tensor:
        """What the loss of an answer's token counts."""
        return self.answer_NS * torch.where(self.column_S < self.told_N[:, None], 1.0, FILLER_WEIGHT)

    @property
    def num_answer_tokens(self) -> int:
        """Tokens of all answers, EOS counted once."""
        return int((self.told_N - self.prompt_N).sum())


Documents = list[tuple[list[int], list[int]]]


def rows_of(documents: Documents, *, multiple: int, canvas: int | None, aligned: bool) -> Rows:
    """Rows of (prompt ids, answer ids with EOS). Filler goes up to a multiple of ``multiple``, or to ``canvas`` tokens
    behind the prompt where a family always decodes so many. ``aligned``: padding before a prompt makes it end at a
    multiple."""
    start = [-len(prompt) % multiple if aligned else 0 for prompt, _ in documents]
    begin = [pad + len(prompt) for pad, (prompt, _) in zip(start, documents, strict=True)]
    told = [first + len(answer) for first, (_, answer) in zip(begin, documents, strict=True)]
    filled = [-(-end // multiple) * multiple for end in told]
    if canvas is not None:
        filled = [first + canvas for first in begin]
    width = -(-max(filled) // multiple) * multiple
    rows = [
        [PAD_ID] * pad + prompt + answer + [EOS_ID] * (filler - end) + [PAD_ID] * (width - filler)
        for (prompt, answer), pad, end, filler in zip(documents, start, told, filled, strict=True)
    ]
    return Rows(*(torch.tensor(part) for part in (rows, start, begin, told, filled)))


def mask_answers(
    rows: Rows, mask_id: int, generator: torch.Generator, *, block_size: int | None
) -> tuple[Tensor, Tensor]:
    """Noisy ids and which of them are masked, both (N, S): each answer token with a probability that is drawn for its
    row, or for its block, uniformly from (0, 1). Prompts stay."""
    num_rows, width = rows.ids_NS.shape
    num_rates = 1 if block_size is None else width // block_size
    device = rows.ids_NS.device
    rate_NR = torch.rand(num_rows, num_rates, generator=generator, device=device)
    rate_NS = rate_NR.repeat_interleave(width // num_rates, dim=1)
    masked_NS = (torch.rand(num_rows, width, generator=generator, device=device) < rate_NS) & rows.answer_NS
    return torch.where(masked_NS, mask_id, rows.ids_NS), masked_NS


def weighted_loss(logits_NSV: Tensor, ids_NS: Tensor, weight_NS: Tensor) -> tuple[Tensor, float]:
    """Mean negative log-likelihood (nats) of the ids where they have a weight, and the share of them predicted
    right."""
    chosen_NS = weight_NS > 0
    logits_RV, targets_R, weight_R = logits_NSV[chosen_NS], ids_NS[chosen_NS], weight_NS[chosen_NS]
    losses_R = nn.functional.cross_entropy(logits_RV, targets_R, reduction="none")
    total = weight_R.sum().clamp(min=1e-9)
    right = ((logits_RV.argmax(-1) == targets_R) * weight_R).sum() / total
    return (losses_R * weight_R).sum() / total, float(right.detach())


Loss = Callable[[nn.Module, Rows, torch.Generator, ModelSizes], tuple[Tensor, float]]


def causal_loss(network: nn.Module, rows: Rows, generator: torch.Generator, sizes: ModelSizes) -> tuple[Tensor, float]:
    """Of the next token, from left to right; prompts count a little, filler does not."""
    assert isinstance(network, Backbone)
    causal_SS = rows.column_S[:, None] >= rows.column_S
    logits_NSV = network.read(rows.ids_NS, *_everywhere(rows, causal_SS))[0]
    told_NS = (rows.column_S < rows.told_N[:, None]) * 1.0
    weight_NS = torch.where(rows.prompt_NS, PROMPT_WEIGHT, told_NS)
    return weighted_loss(logits_NSV[:, :-1], rows.ids_NS[:, 1:], weight_NS[:, 1:])


def canvas_loss(network: nn.Module, rows: Rows, generator: torch.Generator, sizes: ModelSizes) -> tuple[Tensor, float]:
    """Of masked tokens, each seeing its whole row. The bound's weight 1/t is left out, as for the pair of towers."""
    assert isinstance(network, DiT)
    noisy_NS, masked_NS = mask_answers(rows, DIT_MASK_ID, generator, block_size=None)
    logits_NSV = network.whole(noisy_NS, rows.filled_N.tolist())
    return weighted_loss(logits_NSV, rows.ids_NS, rows.weight_NS * masked_NS)


def block_loss(network: nn.Module, rows: Rows, generator: torch.Generator, sizes: ModelSizes) -> tuple[Tensor, float]:
    """Of masked tokens, each seeing its own noisy block and the clean blocks before it: one pass over noisy and clean
    rows together. Blocks are counted from a row's first token."""
    size, mask_id = sizes["block_size"], DIT_MASK_ID if isinstance(network, DiT) else MASK_ID
    noisy_NS, masked_NS = mask_answers(rows, mask_id, generator, block_size=size)
    width = noisy_NS.shape[1]
    both = replace(rows, ids_NS=torch.cat([noisy_NS, rows.ids_NS], dim=1))
    positions_NS, visible_NSS = _everywhere(both, doubled_mask(width, size).to(noisy_NS.device))
    positions_NS = positions_NS % width
    if isinstance(network, DiT):
        logits = network.read(both.ids_NS, View(positions_NS, positions_NS, visible_NSS))[0]
    else:
        assert isinstance(network, Backbone)
        logits = network.read(both.ids_NS, positions_NS, visible_NSS)[0]
    return weighted_loss(logits[:, :width], rows.ids_NS, rows.weight_NS * masked_NS)


def encoded_loss(network: nn.Module, rows: Rows, generator: torch.Generator, sizes: ModelSizes) -> tuple[Tensor, float]:
    """As :func:`block_loss`, but prompts are read as a whole, blocks are counted from their ends, and clean tokens have
    an encoder of their own."""
    assert isinstance(network, E2D2)
    noisy_NS, masked_NS = mask_answers(rows, MASK_ID, generator, block_size=sizes["block_size"])
    real_NS = rows.prompt_NS | rows.answer_NS
    logits_NSV = network.doubled_logits(noisy_NS, rows.ids_NS, real_BS=real_NS, given_BS=rows.prompt_NS)
    return weighted_loss(logits_NSV, rows.ids_NS, rows.weight_NS * masked_NS)


def _everywhere(rows: Rows, visible_SS: Tensor) -> tuple[Tensor, Tensor]:
    """The same positions and mask in every row."""
    return rows.column_S.expand_as(rows.ids_NS), visible_SS.expand(len(rows.ids_NS), -1, -1)


def _qwen3_settings(sizes: ModelSizes) -> dict[str, object]:
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    return {
        "vocab_size": len(VOCABULARY),
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": sizes["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": hidden // heads,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": MAX_LENGTH,
        "tie_word_embeddings": False,
        "attention_bias": False,
    }


def new_qwen3(sizes: ModelSizes) -> Backbone:
    """Transformers' Qwen3 with weights that are drawn from torch's generator."""
    return new_backbone("qwen3", _qwen3_settings(sizes))


def new_transformer(sizes: ModelSizes) -> DiT:
    """MDLM's network with weights that are drawn from torch's generator."""
    hidden = sizes["hidden_size"]
    return new_dit(
        Sizes(
            vocab_size=DIT_MASK_ID + 1,
            hidden_size=hidden,
            num_blocks=sizes["num_hidden_layers"],
            num_heads=sizes["num_attention_heads"],
            condition=hidden,
        )
    )


def new_e2d2(sizes: ModelSizes) -> E2D2:
    """The layers in two halves, the first an encoder's, with one table of tokens for both."""
    settings, num_layers = _qwen3_settings(sizes), sizes["num_hidden_layers"]
    encoder = new_backbone("qwen3", settings | {"num_hidden_layers": _num_encoder(num_layers)})
    decoder = new_backbone("qwen3", settings | {"num_hidden_layers": num_layers - _num_encoder(num_layers)})
    decoder.inner.set_input_embeddings(encoder.inner.get_input_embeddings())
    return E2D2(encoder, decoder, None, sizes["block_size"])


def _num_encoder(num_layers: int) -> int:
    return -(-num_layers // 2)


SPECIAL_IDS = {"pad_token_id": PAD_ID, "bos_token_id": BOS_ID, "eos_token_id": EOS_ID}


def _ar_config(sizes: ModelSizes) -> dict[str, object]:
    return {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], **_qwen3_settings(sizes), **SPECIAL_IDS}


def _sdar_config(sizes: ModelSizes) -> dict[str, object]:
    blocks = {"block_size": sizes["block_size"], "mask_token_id": MASK_ID}
    return {**_ar_config(sizes), "model_type": "sdar", "architectures": ["SDARForCausalLM"], **blocks}


def _mdlm_config(sizes: ModelSizes) -> dict[str, object]:
    return {
        "model_type": "mdlm",
        "architectures": ["MDLM"],
        "vocab_size": DIT_MASK_ID + 1,
        "hidden_dim": sizes["hidden_size"],
        "cond_dim": sizes["hidden_size"],
        "n_blocks": sizes["num_hidden_layers"],
        "n_heads": sizes["num_attention_heads"],
        "model_length": MAX_LENGTH,
        "time_conditioning": False,
        **SPECIAL_IDS,
    }


def _bd3lm_config(sizes: ModelSizes) -> dict[str, object]:
    blocks = {"block_size": sizes["block_size"], "adaln": True, "causal": False}
    return {**_mdlm_config(sizes), "model_type": "bd3lm", "architectures": ["BD3LM"], **blocks}


def _e2d2_config(sizes: ModelSizes) -> dict[str, object]:
    num_layers = sizes["num_hidden_layers"]
    parts = {
        "num_encoder_layers": _num_encoder(num_layers),
        "num_decoder_layers": num_layers - _num_encoder(num_layers),
    }
    return {
        "model_type": "e2d2",
        "architectures": ["E2D2"],
        "vocab_size": len(VOCABULARY),
        "mask_token_id": MASK_ID,
        "backbone_config": {
            "_target_": "backbone_encoder_decoder.LLMasEncoderDecoder",
            "pretrained_model_name_or_path": BASE_FOLDER,
            "tie_encoder_decoder_weights": False,
            "use_encoder_causal_mask": False,
            **parts,
        },
        "block_size": sizes["block_size"],
        "eval_block_size": sizes["block_size"],
        **SPECIAL_IDS,
    }


BASE_FOLDER = "base"  # where E2D2 has the config.json with its layers' sizes


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """A family as it is trained.

    ``reads_canvas``: it always decodes a canvas of the corpus's longest answer. ``aligned``: blocks are counted from
    the end of the prompt. ``base``: the config.json of its folder :data:`BASE_FOLDER`.
    """

    start: Callable[[ModelSizes], Network]
    loss: Loss
    config: Callable[[ModelSizes], dict[str, object]]
    reads_canvas: bool = False
    aligned: bool = False
    base: Callable[[ModelSizes], dict[str, object]] | None = None


TRAINABLE = {
    "ar": Trainable(start=new_qwen3, loss=causal_loss, config=_ar_config),
    "sdar": Trainable(start=new_qwen3, loss=block_loss, config=_sdar_config),
    "mdlm": Trainable(start=new_transformer, loss=canvas_loss, config=_mdlm_config, reads_canvas=True),
    "bd3lm": Trainable(start=new_transformer, loss=block_loss, config=_bd3lm_config),
    "e2d2": Trainable(start=new_e2d2, loss=encoded_loss, config=_e2d2_config, aligned=True, base=_ar_config),
}


def exported(network: Network) -> dict[str, Tensor]:
    """The tensors by the names of the public layout, float32 on the CPU."""
    parts: dict[str, nn.Module] = {PREFIX: network}
    if isinstance(network, Backbone):
        parts = {"": network.inner}
    elif isinstance(network, E2D2):
        parts = {ENCODER: network.encoder.inner, DECODER: network.decoder.inner}
    found = {prefix + name: tensor for prefix, part in parts.items() for name, tensor in part.state_dict().items()}
    found.pop(ENCODER + HEAD, None)  # nothing reads tokens off an encoder
    return {name: tensor.detach().cpu().float().clone() for name, tensor in found.items()}
