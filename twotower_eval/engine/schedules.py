"""Noise schedules of masked diffusion: how likely a token is masked at time t in [0, 1], and the weights that follow.

Pure functions of tensors of times, in the dtype of these.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_eval.errors import UserError


@dataclass(frozen=True)
class LogLinear:
    """The schedule of MDLM, BD3-LM and RADD: a token is masked with probability (1 - eps) t.

    >>> LogLinear().masked(torch.tensor([0.5])).round(decimals=4)
    tensor([0.4995])
    """

    eps: float = 1e-3

    def sigma(self, t: Tensor) -> Tensor:
        """The total noise."""
        return -torch.log1p(-(1 - self.eps) * t)

    def rate(self, t: Tensor) -> Tensor:
        """Its derivative."""
        return (1 - self.eps) / (1 - (1 - self.eps) * t)

    def masked(self, t: Tensor) -> Tensor:
        """The probability that a token is masked."""
        return 1 - torch.exp(-self.sigma(t))

    def weight(self, t: Tensor) -> Tensor:
        """What a masked token's negative log-probability counts in the continuous bound."""
        return self.rate(t) / torch.expm1(self.sigma(t))


BASES = ("linear", "cosine")  # and poly with a number behind it, as in poly2 or poly0.5


@dataclass(frozen=True)
class Masking:
    """MD4's schedules (Shi et al., arXiv 2406.04329): ``linear``, ``cosine``, or ``poly`` with its power, as in
    ``poly0.5``. A token is visible with probability alpha, which is kept ``eps`` away from 0 and 1."""

    name: str = "linear"
    eps: float = 1e-4

    def __post_init__(self) -> None:
        if self.name not in BASES and _power(self.name) is None:
            raise UserError(f"schedule must be linear, cosine or poly with a power, as poly2, not {self.name!r}")

    def alpha(self, t: Tensor) -> Tensor:
        """The probability that a token is visible."""
        return (1 - 2 * self.eps) * self._base(t) + self.eps

    def dalpha(self, t: Tensor) -> Tensor:
        """Its derivative."""
        return (1 - 2 * self.eps) * self._slope(t)

    def weight(self, t: Tensor) -> Tensor:
        """What a masked token's log-probability counts in the continuous bound: below 0."""
        return self.dalpha(t) / (1 - self.alpha(t))

    def log_snr(self, t: Tensor) -> Tensor:
        """Log-odds of a token to be visible."""
        return torch.log(self.alpha(t) / (1 - self.alpha(t)))

    def unmasked(self, s: Tensor, t: Tensor) -> Tensor:
        """The probability that a mask at time t is a token at the earlier time s."""
        return (self.alpha(s) - self.alpha(t)) / (1 - self.alpha(t))

    def _base(self, t: Tensor) -> Tensor:
        if self.name == "linear":
            return 1 - t
        if self.name == "cosine":
            return 1 - torch.cos(math.pi / 2 * (1 - t))
        return 1 - t ** (_power(self.name) or 1)

    def _slope(self, t: Tensor) -> Tensor:
        if self.name == "linear":
            return -torch.ones_like(t)
        if self.name == "cosine":
            return -(math.pi / 2) * torch.sin(math.pi / 2 * (1 - t))
        power = _power(self.name) or 1
        return -power * t ** (power - 1)


def _power(name: str) -> float | None:
    found = re.fullmatch(r"poly(\d+(?:\.\d+)?)", name)
    return (float(found[1]) or None) if found else None


def time_grid(num_steps: int, *, cosine: bool) -> tuple[Tensor, Tensor]:
    """Times after and before each step of a sampler, from 1 on, evenly spaced or by a cosine; (steps,) each."""
    t = (num_steps - torch.arange(num_steps)) / num_steps
    s = (t - 1 / num_steps).clamp(min=0)
    return (_bent(s), _bent(t)) if cosine else (s, t)


def _bent(t: Tensor) -> Tensor:
    return torch.cos(math.pi / 2 * (1 - t)).clamp(min=0)  # rounding may take time 0 below it
