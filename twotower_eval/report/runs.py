"""What every section of a report reads: the runs, and what they say of quality and speed, computed once."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

from twotower_eval.records import Cell, Checkpoint, DecoderSpec
from twotower_eval.report.evidence import PointKey, QualityPoint
from twotower_eval.report.quality import quality_points
from twotower_eval.report.timing import SpeedPoint, speed_points
from twotower_eval.store import Run

# The operating point that the published claim is about: named before anything is measured.
CLAIMED_POINT = {"block_size": 16, "steps_per_block": 16, "threshold": 0.8, "temperature": 0.0}


@dataclass(frozen=True, kw_only=True)
class Section:
    """One part of a report: a title, Markdown below it, and the files that the Markdown links to."""

    title: str
    markdown: str
    files: Mapping[str, bytes] = field(default_factory=dict)


class Runs(Sequence[Run]):
    """Loaded runs in the order of their ids, with what follows from them."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self._runs = sorted(runs, key=lambda run: run.manifest.run_id)
        ids = [run.manifest.run_id for run in self._runs]
        twice = sorted({run_id for run_id in ids if ids.count(run_id) > 1})
        if twice:
            raise ValueError(f"run {twice[0]} is named twice")
        if not ids:
            raise ValueError("no run to report on")

    @overload
    def __getitem__(self, index: int) -> Run: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Run]: ...
    def __getitem__(self, index: int | slice) -> Run | Sequence[Run]:
        return self._runs[index]

    def __len__(self) -> int:
        return len(self._runs)

    @cached_property
    def quality(self) -> tuple[QualityPoint, ...]:
        """Quality at every operating point of every run; a run's points in the order of its plan."""
        return tuple(point for run in self._runs for point in quality_points(run))

    @cached_property
    def _speed(self) -> tuple[tuple[SpeedPoint, ...], tuple[str, ...]]:
        return speed_points(self._runs)

    @property
    def speed(self) -> tuple[SpeedPoint, ...]:
        """Speed of every timed candidate cell."""
        return self._speed[0]

    @property
    def speed_gaps(self) -> tuple[str, ...]:
        """Timed cells that have no complete round yet, in words."""
        return self._speed[1]

    @cached_property
    def points(self) -> dict[PointKey, Cell]:
        """Every measured operating point, with one of its candidate cells."""
        found = [(point.key, point.candidate) for point in self.quality]
        return dict(found + [(point.key, point.candidate) for point in self.speed])

    @cached_property
    def chosen(self) -> PointKey | None:
        """The point that the headline is about, chosen without a look at any result.

        The only one; else the one that the published claim names; else the first in the plan of those with both
        quality and speed; else the first.
        """
        keys = list(self.points)
        both = [key for key in keys if self.quality_at(key) and self.speed_at(key)]
        claimed = [key for key in both or keys if is_claimed(self.points[key].decoder)]
        return next(iter(claimed or both or keys), None)

    def quality_at(self, key: PointKey) -> QualityPoint | None:
        """Quality of an operating point: of whole tasks where they were run, else of the timed outputs."""
        found = [point for point in self.quality if point.key == key]
        return min(found, key=lambda point: (point.timed, -len(point.tasks)), default=None)

    def speed_at(self, key: PointKey) -> SpeedPoint | None:
        """Speed of an operating point: on the answer workload where there is one, at the smallest batch."""
        found = [point for point in self.speed if point.key == key]
        return min(found, key=lambda point: (point.workload != "answer", point.batch_size), default=None)

    def name(self, cell: Cell, *, short: bool = False) -> str:
        """An operating point's name; with the checkpoint's where the report has several."""
        checkpoints = {key[:2] for key in self.points}
        text = short_name(cell.decoder) if short else long_name(cell.decoder)
        return text if len(checkpoints) == 1 else f"{checkpoint_name(cell.checkpoint)}: {text}"


def checkpoint_name(checkpoint: Checkpoint) -> str:
    """A checkpoint's name, and which of its towers if only one is meant."""
    return f"{checkpoint.name} ({checkpoint.tower} tower)" if checkpoint.tower else checkpoint.name


def is_claimed(decoder: DecoderSpec) -> bool:
    """Whether a decoder stands at the published claim's settings."""
    return decoder.kind == "block_diffusion" and all(
        setting(decoder, name) == value for name, value in CLAIMED_POINT.items()
    )


def setting(decoder: DecoderSpec, name: str) -> Any:
    """A decoder's parameter, ``None`` without it; steps left open are the block size."""
    value = decoder.params.get(name)
    return decoder.params.get("block_size") if name == "steps_per_block" and value is None else value


def long_name(decoder: DecoderSpec) -> str:
    """``block 16, 16 steps, threshold 0.8`` for what has these; parameters off their default follow."""
    if "block_size" not in decoder.params:
        return ", ".join(_unusual(decoder))
    parts = [f"block {setting(decoder, 'block_size')}", f"{setting(decoder, 'steps_per_block')} steps"]
    if "threshold" in decoder.params:
        parts.append(f"threshold {decoder.params['threshold']:g}")
    return ", ".join([*parts, *_unusual(decoder)])


def short_name(decoder: DecoderSpec) -> str:
    """``16/16/0.8``: block size, steps, threshold."""
    if "block_size" not in decoder.params:
        return decoder.kind
    parts = [f"{setting(decoder, name)}" for name in ("block_size", "steps_per_block")]
    if "threshold" in decoder.params:
        parts.append(f"{decoder.params['threshold']:g}")
    return ", ".join(["/".join(parts), *_unusual(decoder)])


def _unusual(decoder: DecoderSpec) -> list[str]:
    named = ("block_size", "steps_per_block", "threshold")
    kind = [] if decoder.kind == "block_diffusion" else [decoder.kind]
    rest = {name: value for name, value in decoder.params.items() if name not in named and value}
    return kind + [f"{name.replace('_', ' ')} {json.dumps(value)}" for name, value in rest.items() if name != "trace"]
