"""A kernel that begins while the one before it ends (programmatic dependent launch, Hopper and later).

Launched so, a kernel may read weights at once, which nobody writes, and waits before it touches anything else; the
stream of weights then does not pause between kernels. All kernels of ops/fused wait, so that none overtakes another.
One exception: what was written before the kernel ahead began may be read at once too, if that one lets the next begin
only when it has waited itself (who was chosen, in experts.py).
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FIRST_CAPABILITY = (9, 0)


@triton.jit
def let_next_begin(OVERLAP: tl.constexpr):
    """The next kernel may begin when all programs have come here: what it waits for is the end of this one."""
    if OVERLAP:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(OVERLAP: tl.constexpr):
    """From here on everything that earlier kernels wrote is there."""
    if OVERLAP:
        gdc_wait()


def overlapping(device: torch.device, *weights: torch.Tensor) -> dict[str, bool]:
    """Arguments of a launch on this device; weights that have to be laid out anew first are not there at once."""
    able = _can_overlap(device) and all(weight.is_contiguous() for weight in weights)
    return {"OVERLAP": able, "launch_pdl": able} if able else {"OVERLAP": False}


@cache
def _can_overlap(device: torch.device) -> bool:
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= FIRST_CAPABILITY
    )
