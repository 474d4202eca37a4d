"""Random weights for a tower that has none: to be trained, or to be timed."""

from __future__ import annotations

import math

import torch

from twotower_eval.engine.models.nemotron_h import Tower


@torch.no_grad()
def initialise(tower: Tower, generator: torch.Generator) -> None:
    """Random weights for a tower to be trained: normal(0, initializer_range), outputs shrunk with depth, Mamba's
    step sizes log-uniform between ``time_step_min`` and ``time_step_max`` (arXiv 2312.00752, section 3.6)."""
    config = tower.config
    for name, parameter in tower.named_parameters():
        if name.endswith(("norm.weight", "norm_f.weight", ".D")):
            parameter.fill_(1.0)
        elif name.endswith("A_log"):
            parameter.copy_(torch.arange(1, config.mamba_num_heads + 1).log())
        elif name.endswith("dt_bias"):
            low, high = math.log(config.time_step_min), math.log(config.time_step_max)
            step = torch.empty_like(parameter).uniform_(low, high, generator=generator).exp()
            step = step.clamp(min=config.time_step_floor)
            parameter.copy_(step + torch.log(-torch.expm1(-step)))
        elif name.endswith(("conv1d.bias", "e_score_correction_bias")):
            parameter.zero_()
        elif name.endswith("conv1d.weight"):
            bound = 1 / math.sqrt(config.conv_kernel)
            parameter.uniform_(-bound, bound, generator=generator)
        else:
            out = name.endswith(("out_proj.weight", "o_proj.weight", "down_proj.weight", "experts_down_EHI"))
            shrink = math.sqrt(len(config.pattern)) if out else 1.0
            parameter.normal_(0.0, config.initializer_range / shrink, generator=generator)
