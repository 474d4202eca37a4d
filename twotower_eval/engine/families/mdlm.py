"""MDLM: a diffusion transformer that reads the whole canvas (Sahoo et al., arXiv 2406.07524). Logits at p predict the
token at p."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from twotower_eval.engine.families.canvas import CanvasModel
from twotower_eval.engine.families.dit import DiT, Sizes, load_dit
from twotower_eval.engine.families.settings import identify, whole_number
from twotower_eval.engine.models.checkpoint import read_json
from twotower_eval.engine.models.identity import read_whole
from twotower_eval.engine.schedules import LogLinear
from twotower_eval.strict import JsonObject

PREFIX = "backbone."


class MDLM(CanvasModel):
    """The network. ``timed``: it is told the noise level; published checkpoints are told 0 in every call."""

    def __init__(self, network: DiT, *, timed: bool) -> None:
        super().__init__()
        self.network = network
        self.timed = timed

    def canvas_logits(self, ids_BS: Tensor, lengths: Sequence[int]) -> Tensor:
        """Every token sees every token of its row; positions count from 0, and padding is hidden."""
        return self.network.whole(ids_BS, lengths)

    def timed_logits(self, ids_BS: Tensor, lengths: Sequence[int], t_B: object) -> Tensor:
        """At the noise level of a time if the model is told it."""
        if not self.timed or t_B is None:
            return self.canvas_logits(ids_BS, lengths)
        t = torch.as_tensor(t_B, dtype=torch.float32)
        return self.network.whole(ids_BS, lengths, sigma_B=LogLinear().sigma(t).expand(len(ids_BS)))


def sizes_of(folder: Path, config: JsonObject) -> Sizes:
    """The sizes by the words of MDLM and BD3-LM."""
    return Sizes(
        vocab_size=whole_number(folder, config, "vocab_size"),
        hidden_size=whole_number(folder, config, "hidden_dim"),
        num_blocks=whole_number(folder, config, "n_blocks"),
        num_heads=whole_number(folder, config, "n_heads"),
        condition=whole_number(folder, config, "cond_dim"),
    )


def load(
    folder: Path, *, devices: tuple[str, ...], dtype: torch.dtype, tower: Literal["context"] | None = None
) -> MDLM:
    """Load a checkpoint in the public layout. UserError for what is wrong with it."""
    config = read_json(folder / "config.json")
    sizes = sizes_of(folder, config)
    tensors, checkpoint = read_whole(folder, family="mdlm", dtype=dtype, devices=devices[:1])
    named = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
    network = load_dit(folder, sizes, named, dtype=dtype, device=devices[0])
    model = MDLM(network, timed=bool(config.get("time_conditioning", False)))
    return identify(
        model,
        folder,
        config,
        checkpoint,
        vocab_size=sizes.vocab_size,
        max_length=whole_number(folder, config, "model_length"),
        mask_token_id=sizes.vocab_size - 1,
    )
