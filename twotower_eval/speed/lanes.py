"""Lanes: the cells of a plan, each ready to time any of its calls. The baseline has two, for the A/A null."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from twotower_eval.models.prompts import stops_of
from twotower_eval.plan import SpeedPlan
from twotower_eval.records import Arm, Cell, DecoderSpec, Generation, Prompt, cell_id, derive_seed
from twotower_eval.speed.clock import CallClock, Devices, TimedModel, no_garbage_collection
from twotower_eval.speed.workloads import Call, Calls, Request, encode_calls, make_workload


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What one timed call gave, in seconds from its start."""

    generations: tuple[Generation, ...]
    wall_s: float
    prefill_s: float | None
    first_output_s: float
    peak_memory_bytes: int | None
    peak_memory_reason: str | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Lane:
    """One cell as it is timed. ``replica`` is 1 for the second copy of the baseline; ``ids`` are by call id."""

    cell: Cell
    replica: int
    model: TimedModel
    decoder: Any
    clock: CallClock
    devices: Devices
    ids: Mapping[str, tuple[tuple[int, ...], ...]]
    seed: int

    def prompts(self, call: Call, sample: int) -> list[Prompt]:
        """The call's prompts; sampling differs from ``sample`` to sample, as between an evaluation's samples."""
        prompts = []
        for request, ids in zip(call.requests, self.ids[call.id], strict=True):
            seed = derive_seed(self.seed, request.task, request.doc_id, 0, sample)
            prompts.append(Prompt(id=f"{request.task}/{request.doc_id}", token_ids=ids, seed=seed))
        return prompts

    def time(self, call: Call, sample: int) -> Timing:
        """Decode the call once, from prompt ids on the host to the last id on the host."""
        prompts = self.prompts(call, sample)
        eos_token_ids = () if call.ignore_eos else self.model.eos_token_ids
        stop = call.stop if call.ignore_eos else stops_of(self.model, call.stop)
        self.model.forget()
        self.devices.forget_peak()
        with no_garbage_collection():
            started_s = self.clock()
            try:
                generations = self.decoder.generate(
                    prompts, max_new_tokens=call.max_new_tokens, eos_token_ids=eos_token_ids, stop=stop
                )
            except torch.OutOfMemoryError as error:
                raise ValueError(
                    f"{self.name}: out of memory: take smaller --batch-sizes or a shorter prompt"
                ) from error
            wall_s = self.clock() - started_s
        self._check(call, generations)
        peak_memory_bytes, reason = self.devices.peak_memory()
        moments_s = (self.model.prefilled_at_s, self.model.extended_at_s)
        prefill_s, extended_s = (None if moment is None else moment - started_s for moment in moments_s)
        ends_s = [wall_s, *(g.finish_s for g in generations if g.finish_s is not None)]
        return Timing(
            generations=tuple(generations),
            wall_s=wall_s,
            prefill_s=prefill_s,
            first_output_s=min([*ends_s, *([] if extended_s is None else [extended_s])]),
            peak_memory_bytes=peak_memory_bytes,
            peak_memory_reason=reason,
        )

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.cell.arm} {self.cell.decoder.label}, batch size {self.cell.workload.batch_size}"

    def _check(self, call: Call, generations: Sequence[Generation]) -> None:
        if len(generations) != len(call.requests):
            raise ValueError(f"{self.name}: {len(generations)} generations for {len(call.requests)} prompts")
        short = [g.num_tokens for g in generations if call.ignore_eos and g.num_tokens != call.max_new_tokens]
        if short:
            raise ValueError(f"{self.name}: made {short[0]} tokens where exactly {call.max_new_tokens} were asked for")


def make_lanes(
    plan: SpeedPlan,
    calls: Calls,
    requests: Sequence[Request],
    specs: Sequence[DecoderSpec],
    models: tuple[Any, Any],
    clock: CallClock,
) -> dict[int, tuple[Lane, ...]]:
    """By batch size: the baseline, its copy, and every candidate. ``models`` are those of baseline and candidate."""
    from twotower_eval.decoders import decoder_spec, from_spec

    autoregressive = decoder_spec("autoregressive", temperature=float(plan.temperature or 0))
    timed = [TimedModel(model, clock) for model in models]
    ids = [encode_calls(plan, calls, requests, model) for model in models]
    arms: list[tuple[Arm, int, DecoderSpec]] = [("baseline", 0, autoregressive), ("baseline", 1, autoregressive)]
    arms += [("candidate", 0, spec) for spec in specs]
    lanes: dict[int, tuple[Lane, ...]] = {}
    for size in plan.batch_sizes:
        found: dict[tuple[str, int], Lane] = {}
        for arm, replica, spec in arms:
            which = 0 if arm == "baseline" else 1
            cell = _cell(plan, calls[size], size, arm, models[which], spec)
            lane = Lane(
                cell=cell,
                replica=replica,
                model=timed[which],
                decoder=from_spec(timed[which], spec, clock=clock),
                clock=clock,
                devices=Devices(cell.checkpoint.devices),
                ids=ids[which],
                seed=plan.seed,
            )
            # An AR model timed against itself is one cell; its copy is the only other lane.
            found.setdefault((cell.id, replica), lane)
        lanes[size] = tuple(found.values())
    return lanes


def _cell(plan: SpeedPlan, calls: Sequence[Call], size: int, arm: Arm, model: Any, spec: DecoderSpec) -> Cell:
    workload = make_workload(plan, calls, size, len(model.checkpoint.devices))
    extra = {"seed": plan.seed if (plan.temperature or 0) > 0 else None}
    return Cell(
        id=cell_id(model.checkpoint, spec, workload, extra),
        arm=arm,
        checkpoint=model.checkpoint,
        decoder=spec,
        workload=workload,
    )
