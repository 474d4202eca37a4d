"""Conditions of timing: the device's peak rates, the baseline's best case, and CUDA graphs in both arms or neither.
Measured outside the rounds."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

from twotower_eval.decoder_settings import block_sizes
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models.arms import enable_cuda_graphs
from twotower_eval.engine.models.config import NemotronHConfig, Step, step_bytes
from twotower_eval.engine.models.graphs import MAX_NEW, StepGraphs
from twotower_eval.engine.models.protocol import Model, as_model
from twotower_eval.engine.models.quantised import held_bytes
from twotower_eval.engine.models.transformers_model import ForwardError, TransformersModel
from twotower_eval.engine.models.transformers_static import StaticSteps
from twotower_eval.errors import UserError
from twotower_eval.measure.speed.clock import CallClock, Devices
from twotower_eval.measure.speed.costs import REPEATS
from twotower_eval.measure.speed.lanes import Lane
from twotower_eval.measure.speed.workloads import Calls, Load
from twotower_eval.plan import SizingPlan, SpeedPlan
from twotower_eval.records import BaselineBest, Prompt, SpeedPhase
from twotower_eval.store import RunWriter

NUM_TRIALS = 5
PACKED_DTYPES = (torch.uint8, torch.int8, torch.int32)
LEAST_PACKED = 1024  # smaller ones are settings
COPY_BYTES = {"cuda": 1 << 30, "mps": 1 << 28, "cpu": 1 << 27}  # well beyond any cache
PRODUCT_SIZE = {"cuda": 8192, "mps": 4096, "cpu": 768}


@dataclass(frozen=True, kw_only=True)
class DevicePeak:
    """Peak rates, each the best of a few trials, so that a floor computed from them is, if anything, too low.

    ``free_reason`` says why ``free_bytes`` are unknown, or how to read them.
    """

    device: str
    dtype: str
    bytes_per_s: float
    flops_per_s: float
    free_bytes: int | None
    free_reason: str | None


def device_peak(device: str, dtype: torch.dtype) -> DevicePeak:
    """Measure copy bandwidth, matrix-product rate and free memory."""
    devices = Devices([device])  # refuses devices that cannot be synchronised
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
    """Bytes read and written per second by a copy, at best."""
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
    """Free bytes on a device, with a reason if they are unknown or uncertain."""
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
    """The machine's total memory, an upper bound, if the system does not report what is free."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "if nothing else used this machine's memory"
    except (AttributeError, ValueError, OSError):  # missing on Windows; the names may be unknown elsewhere
        return None, "the system does not tell how much memory is free"


def _best_s(devices: Devices, action: Callable[[], object]) -> float:
    walls_s = []
    for _ in range(NUM_TRIALS + 1):  # the first one warms up
        devices.synchronise()
        started_s = time.perf_counter()
        action()
        devices.synchronise()
        walls_s.append(time.perf_counter() - started_s)
    return min(walls_s)


NUM_PROMPTS, NUM_TOKENS = 5, 24  # prompts decoded to compare with transformers' generate


def measured_conditions(
    lanes: Mapping[Load, Sequence[Lane]], calls: Calls, clock: CallClock, *, cuda_graphs: bool
) -> Iterator[BaselineBest]:
    """One record per baseline and batch size."""
    of_baselines = [
        (size, lane)
        for size, of_size in lanes.items()
        for lane in of_size
        if lane.cell.arm == "baseline" and lane.replica == 0 and lane.cell.checkpoint.served is None
    ]
    devices = dict.fromkeys(lane.cell.checkpoint.devices[0] for _, lane in of_baselines)
    rates = {device: copy_bytes_per_s(device) for device in devices}
    for size, lane in of_baselines:
        model = lane.untimed
        theirs = _of_transformers(model)
        rows = [ids for call in calls[size] for ids in lane.ids[call.id]]
        budget = max(call.max_new_tokens for call in calls[size])
        middle = sorted(map(len, rows))[len(rows) // 2] + budget // 2
        yield BaselineBest(
            cell=lane.cell.id,
            engine="own" if theirs is None else "transformers",
            cuda_graphs=cuda_graphs,
            attention=None if theirs is None else getattr(theirs.inner.config, "_attn_implementation", None),
            num_threads=torch.get_num_threads(),
            step_bytes=_step_bytes(model, lane.cell.workload.batch_size or 1, middle),
            bytes_per_s=rates[model.checkpoint.devices[0]],
            **({} if theirs is None else _beside_generate(theirs, rows, min(NUM_TOKENS, budget), clock)),
        )


def _of_transformers(model: object) -> TransformersModel | None:
    return model if isinstance(model, TransformersModel) else None


def _step_bytes(model: Model, batch_size: int, context_tokens: int) -> float | None:
    """Lower bound on the bytes that a one-token step reads: the weights and, if the config allows, the context.

    Of a separate embedding a step reads about a row; experts of foreign models are not separated.
    """
    parameters = {id(weight): weight for weight in model.parameters()} if hasattr(model, "parameters") else {}
    if not parameters:
        return None
    config = getattr(model, "config", None)
    if isinstance(config, NemotronHConfig):
        step = Step(
            part="ar_step",
            batch_size=batch_size,
            num_tokens=1,
            context_tokens=context_tokens,
            routing="independent",
        )
        return step_bytes(step, config, next(iter(parameters.values())).element_size())
    total = held_bytes([*parameters.values(), *_packed_buffers(model)])
    if (theirs := _of_transformers(model)) is not None:
        table, head = theirs.inner.get_input_embeddings().weight, theirs.inner.get_output_embeddings().weight
        total -= 0 if table is head else held_bytes([table])
    return total


def _packed_buffers(model: Model) -> list[torch.Tensor]:
    """Quantised weights that a module keeps as buffers, as GPTQ's and AWQ's do; other buffers are no weights."""
    buffers = model.buffers() if hasattr(model, "buffers") else ()
    return [buffer for buffer in buffers if buffer.dtype in PACKED_DTYPES and buffer.numel() > LEAST_PACKED]


def _beside_generate(
    model: TransformersModel, rows: Sequence[tuple[int, ...]], num_new: int, clock: CallClock
) -> dict[str, Any]:
    """Seconds of our decoding and of transformers' generate on a few prompts, alternating, after a warm-up."""
    decoder = make_decoder(as_model(model), "autoregressive")
    own_s, generate_s, same = [], [], True
    chosen = [rows[number % len(rows)] for number in range(NUM_PROMPTS + 1)]
    for number, ids in enumerate(chosen):
        began_s = clock()
        [made] = decoder.generate([Prompt(id=str(number), token_ids=ids)], max_new_tokens=num_new)
        half_s = clock()
        try:
            theirs = model.own_generate(torch.tensor([ids]), num_new)
        except ForwardError as error:
            return {"reason": str(error)}
        ended_s = clock()
        same &= list(made.token_ids) == theirs
        if number:
            own_s.append(half_s - began_s)
            generate_s.append(ended_s - half_s)
    return {"own_s": tuple(own_s), "generate_s": tuple(generate_s), "same_tokens": same}


Timing = TypeVar("Timing")
MAX_ATTEMPTS = 5  # the same prompts need the same sizes, so the second attempt captures nothing


class Captures:
    """Keeps captures of CUDA graphs, and steps that are compiled, out of timings; does nothing without either.

    How long each step took to compile is journalled.
    """

    def __init__(
        self, graphs: Sequence[StepGraphs], writer: RunWriter, compiling: Sequence[tuple[str, StaticSteps]] = ()
    ) -> None:
        self._graphs, self._writer, self._compiling = graphs, writer, compiling
        self._num_journalled = [steps.num_made for _, steps in compiling]  # earlier ones are of another run

    @property
    def num_made(self) -> int:
        """Number of steps captured or compiled so far."""
        return sum(one.num_made for one in self._graphs) + sum(one.num_made for _, one in self._compiling)

    def _journal(self) -> None:
        """What was compiled since the last time, in timed calls or beside them."""
        for place, (model, steps) in enumerate(self._compiling):
            for made in steps.made[self._num_journalled[place] :]:
                size = {"rows": made.size.slots, "columns": made.size.columns, "mode": made.size.compile}
                self._writer.event("compiled", model=model, wall_s=made.wall_s, **size)
            self._num_journalled[place] = steps.num_made

    def outside(self, phase: SpeedPhase, number: int, what: str, measure: Callable[[], Timing]) -> Timing:
        """The result of ``measure``, repeated until no step was captured meanwhile; warm-ups and probes are not
        repeated."""
        for _ in range(MAX_ATTEMPTS):
            before = self.num_made
            timing = measure()
            self._journal()
            num_made = self.num_made - before
            if phase != "measure" or not num_made:
                return timing
            self._writer.event("timed_again", what=what, round=number, num_captured=num_made)
        raise UserError(
            f"{what}: every attempt needs CUDA graphs of new sizes, or compiles anew: drop --cuda-graphs, or compile"
        )


def hint(plan: SpeedPlan | SizingPlan) -> str | None:
    """What to say where a GPU is given the kernels of a step one by one: its small steps then last as long as the host
    needs for that, in both arms."""
    if plan.cuda_graphs or not any(device.startswith("cuda") for device in plan.devices):
        return None
    return (
        "without --cuda-graphs small steps last as long as the host needs to launch their kernels, in both arms "
        "(on one H200 24 ms for an AR step instead of 2.4)"
    )


def refuse_uneven(batch_sizes: Iterable[int], block_sizes: Iterable[int]) -> None:
    """UserError if one-token steps would use CUDA graphs and block steps would not."""
    rows, width = max(batch_sizes), max(block_sizes, default=1)
    if rows * width > MAX_NEW:
        raise UserError(
            f"batch size {rows} with blocks of {width} makes steps of {rows * width} tokens, and CUDA graphs serve "
            f"{MAX_NEW}: graphs in one arm alone would handicap the other: take smaller ones, or drop --cuda-graphs"
        )


def compiling(models: Sequence[Model]) -> tuple[tuple[str, StaticSteps], ...]:
    """The parts of both arms' models that may compile steps, each once, with the model's name."""
    found = {id(model): model for model in map(_of_transformers, models) if model is not None}
    return tuple((model.checkpoint.name, model.static_steps) for model in found.values())


def graphs_for(
    plan: SpeedPlan, calls: Calls, lanes: Mapping[Load, Sequence[Lane]], models: Sequence[Model]
) -> tuple[StepGraphs, ...]:
    """Both arms' CUDA graphs, as many as this plan's prompts and budgets can need; none unless the plan wants them."""
    if not plan.cuda_graphs:
        return ()
    longest_prompt = max(
        len(ids) for of_size in lanes.values() for lane in of_size for call in lane.ids.values() for ids in call
    )
    budget = max(call.max_new_tokens for of_size in calls.values() for call in of_size)
    # The last block may go beyond the budget, and parts timed alone go on from there.
    beyond = (max(REPEATS.values()) + 2) * max(block_sizes(plan), default=1)
    longest = longest_prompt + budget + beyond
    return enable_cuda_graphs(models, max_rows=max(plan.batch_sizes), block_sizes=block_sizes(plan), longest=longest)
