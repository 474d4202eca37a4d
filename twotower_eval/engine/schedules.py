"""Noise schedules of masked diffusion: how likely a token is masked at time t in [0, 1], and the weights that follow.

Pure functions of tensors of times, in the dtype of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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
