"""What all decoders share about a batch of rows: padding prompts, one random stream per row, choosing tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower_eval.errors import UserError
from twotower_eval.records import Prompt


def padded_ids(rows: Sequence[Sequence[int]]) -> tuple[Tensor, list[int]]:
    """Ids (B, S) padded on the right with 0, and lengths."""
    lengths = [len(row) for row in rows]
    width = max(lengths)
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], dtype=torch.int64), lengths


def check_temperature(temperature: float) -> None:
    """UserError unless it is a finite number of at least 0."""
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be 0 (greedy) or a positive number, not {temperature}")


def on_host(tokens: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
    """Both on the host, with a single wait for the device: all that a denoiser step waits for."""
    if tokens.device.type == "cpu":
        return tokens, confidence
    return unpacked(packed(tokens, confidence).cpu(), confidence.dtype)


def packed(tokens: Tensor, confidence: Tensor) -> Tensor:
    """Token ids and confidences in one float64 tensor (2, ...), which holds both exactly."""
    return torch.stack([tokens.double(), confidence.double()])


def unpacked(both: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What was :func:`packed`: int64 ids, and confidences of ``dtype``."""
    return both[0].to(torch.int64), both[1].to(dtype)


class RowNoise:
    """Gumbel noise from one generator per row, seeded by its prompt, so that a row never depends on its neighbours.

    Drawn on the host in float32, so that devices agree.
    """

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        self.generators = [torch.Generator().manual_seed(prompt.seed) for prompt in prompts]

    def gumbel(self, rows: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Tensor:
        """Standard Gumbel noise (len(rows), *shape), each row from its own stream."""
        uniform = torch.stack([torch.rand(shape, generator=self.generators[row]) for row in rows])
        return -torch.log(-torch.log(uniform.clamp(min=1e-20, max=1 - 1e-7))).to(device)


def choose(logits: Tensor, temperature: float, noise: RowNoise, rows: Sequence[int]) -> Tensor:
    """Token ids (B, ...) from logits (B, ..., V): argmax, or a Gumbel-max sample of logits / temperature."""
    if temperature > 0:
        logits = logits / temperature + noise.gumbel(rows, tuple(logits.shape[1:]), logits.device)
    return logits.argmax(-1)
