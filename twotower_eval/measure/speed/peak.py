"""What a device can do at best, found out in a moment: bytes per second of a copy, operations per second of a product.

Measured on the device itself, because tables of peak figures know neither its clocks nor its neighbours.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from twotower_eval.measure.speed.clock import Devices

NUM_TRIALS = 5
COPY_BYTES = {"cuda": 1 << 30, "cpu": 1 << 27}  # well beyond any cache
PRODUCT_SIZE = {"cuda": 8192, "cpu": 768}


@dataclass(frozen=True, kw_only=True)
class DevicePeak:
    """The best of a few trials each: a floor built from it errs on the side of asking too much of the model.

    ``free_reason`` says why ``free_bytes`` are unknown, or how they are to be read.
    """

    device: str
    dtype: str
    bytes_per_s: float
    flops_per_s: float
    free_bytes: int | None
    free_reason: str | None


def device_peak(device: str, dtype: torch.dtype) -> DevicePeak:
    """Copy, multiply, and ask how much memory is free."""
    devices = Devices([device])  # refuses what nobody can wait for
    product_s = _product_s(device, devices, dtype)
    kind = torch.device(device).type
    free_bytes, reason = free_memory(device)
    return DevicePeak(
        device=device,
        dtype=str(dtype).removeprefix("torch."),
        bytes_per_s=copy_bytes_per_s(device),
        flops_per_s=2 * PRODUCT_SIZE[kind] ** 3 / product_s,
        free_bytes=free_bytes,
        free_reason=reason,
    )


def copy_bytes_per_s(device: str) -> float:
    """Bytes that a copy reads and writes in a second, at best."""
    return 2 * COPY_BYTES[torch.device(device).type] / _copy_s(device, Devices([device]))


def _copy_s(device: str, devices: Devices) -> float:
    source = torch.ones(COPY_BYTES[torch.device(device).type] // 4, device=device)
    target = torch.empty_like(source)
    return _best_s(devices, lambda: target.copy_(source))


def _product_s(device: str, devices: Devices, dtype: torch.dtype) -> float:
    size = PRODUCT_SIZE[torch.device(device).type]
    matrix = torch.ones(size, size, dtype=dtype, device=device)
    return _best_s(devices, lambda: matrix @ matrix)


def free_memory(device: str) -> tuple[int | None, str | None]:
    """Bytes that can still be taken on a device; a reason where they are not known, or not well."""
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info(device)[0], None
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return _whole_memory()
    kilobytes = next((line.split()[1] for line in lines if line.startswith("MemAvailable:")), None)
    return _whole_memory() if kilobytes is None else (int(kilobytes) * 1024, None)


def _whole_memory() -> tuple[int | None, str]:
    """The machine's memory, where the system does not tell how much of it is free: more can never be taken."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "if nothing else used this machine's memory"
    except (AttributeError, ValueError, OSError):  # Windows has no such call, others may not know the names
        return None, "the system does not tell how much memory is free"


def _best_s(devices: Devices, action: Callable[[], object]) -> float:
    walls_s = []
    for _ in range(NUM_TRIALS + 1):  # the first one warms up, and is no better than the rest
        devices.synchronise()
        started_s = time.perf_counter()
        action()
        devices.synchronise()
        walls_s.append(time.perf_counter() - started_s)
    return min(walls_s)
