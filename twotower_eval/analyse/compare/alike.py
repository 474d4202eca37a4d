"""What figures of two operating points must share before a line may join them, and the lines that there are.

Two figures are alike if the same documents were scored on the same tasks from the same kind of outputs, or the same
prompts were timed in the same workload, batch and run. Whatever else they say, a line between others says nothing.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from twotower_eval.analyse.compare.naming import checkpoint_name, number, setting, unusual
from twotower_eval.analyse.compare.points import QualityPoint
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.records import Cell, DecoderSpec, Estimate, WorkloadKind, canonical_json


@dataclass(frozen=True, kw_only=True)
class MeasuredOn:
    """What a figure was measured on; equal ones are alike. ``kind`` is ``task`` for whole tasks.

    ``num_documents`` were scored over ``num_tasks``, or ``num_calls`` were timed; the others are ``None``. ``same`` is
    all that has to be equal beside what is told here.
    """

    kind: WorkloadKind
    batch_size: int | None
    run_ids: tuple[str, ...]
    num_tasks: int | None = None
    num_documents: int | None = None
    num_calls: int | None = None
    same: str

    @property
    def wanted(self) -> tuple[int, ...]:
        """Sorts what says most of a point first: whole tasks, more of them, answers before fixed lengths."""
        kind = ("task", "answer", "fixed").index(self.kind)
        sizes = (self.num_tasks or 0, self.num_documents or 0, self.num_calls or 0)
        return (kind, *(-size for size in sizes[:2]), self.batch_size or 0, -sizes[2])


def scored_on(point: QualityPoint) -> MeasuredOn:
    """Documents, tasks, ways of scoring and outputs that a retention rests on."""
    tasks = [[task.name, task.metric, task.filter, task.scored_by] for task in point.tasks]
    baseline = point.baseline.checkpoint
    return MeasuredOn(
        kind=point.candidate.workload.kind,
        batch_size=point.candidate.workload.batch_size,
        run_ids=(point.run_id,),
        num_tasks=len(point.tasks),
        num_documents=sum(task.num_documents for task in point.tasks),
        same=canonical_json([point.documents_sha256, tasks, baseline.identity, baseline.dtype]),
    )


def timed_on(point: SpeedPoint) -> MeasuredOn:
    """Prompts, workload, batch, devices, baseline and runs that a speedup rests on."""
    return MeasuredOn(
        kind=point.candidate.workload.kind,
        batch_size=point.batch_size,
        run_ids=point.run_ids,
        num_calls=point.num_calls,
        same=canonical_json([point.baseline.id, point.candidate.workload.digest, point.candidate.workload.num_devices]),
    )


def any_run(found: MeasuredOn) -> MeasuredOn:
    """The same, whichever run it was measured in: for scores, which do not depend on it."""
    return dataclasses.replace(found, run_ids=())


@dataclass(frozen=True, kw_only=True)
class PointFigure:
    """One figure of one operating point. ``invalid``: its timing must not be read as a speedup."""

    candidate: Cell
    on: MeasuredOn
    value: float
    estimate: Estimate | None = None
    invalid: bool = False


@dataclass(frozen=True, kw_only=True)
class Series:
    """Figures that are alike, over one setting, each with its value of the setting; what they share is ``label``."""

    label: str
    on: MeasuredOn
    figures: tuple[tuple[float, PointFigure], ...]

    @property
    def joined(self) -> bool:
        """Whether there is a line."""
        return len(self.figures) > 1

    @property
    def crossed(self) -> bool:
        """Whether a timing among them is INVALID."""
        return any(figure.invalid for _, figure in self.figures)


def families(name: str, candidates: Iterable[Cell]) -> dict[str, str]:
    """Words for every family of operating points, by its key: what they share apart from the setting ``name``."""
    cells = {family_key(name, cell): cell for cell in candidates if number(cell.decoder, name) is not None}
    models = {_model(cell)[:2]: checkpoint_name(cell.checkpoint) for cell in cells.values()}
    names = Counter(models.values())
    dtypes = len({cell.checkpoint.dtype for cell in cells.values()}) > 1
    found = {}
    for key, cell in cells.items():
        name_of, own = checkpoint_name(cell.checkpoint), cell.checkpoint.identity[:8]
        whose = [name_of if names[name_of] == 1 else f"{name_of} {own}"] if len(models) > 1 else []
        whose += [cell.checkpoint.dtype] if dtypes else []
        found[key] = ": ".join([*([", ".join(whose)] if whose else []), _label(name, cell.decoder)])
    return found


def family_key(name: str, cell: Cell) -> str:
    """All that an operating point is apart from the setting ``name``; steps may be said to follow the block size."""
    params = {key: value for key, value in cell.decoder.params.items() if key != name}
    if name != "steps_per_block" and "block_size" in cell.decoder.params:
        follows = setting(cell.decoder, "steps_per_block") == setting(cell.decoder, "block_size")
        params["steps_per_block"] = "auto" if follows else setting(cell.decoder, "steps_per_block")
    code = [[file.name, file.sha256] for file in cell.decoder.code or ()]
    return canonical_json([_model(cell), cell.decoder.kind, cell.decoder.version, code, params])


def _model(cell: Cell) -> tuple[str, str | None, str]:
    return (cell.checkpoint.identity, cell.checkpoint.tower, cell.checkpoint.dtype)


def _label(name: str, decoder: DecoderSpec) -> str:
    parts = []
    if "block_size" not in decoder.params:
        return ", ".join(unusual(decoder, without=(name,))) or decoder.kind
    if name != "block_size":
        parts.append(f"block {setting(decoder, 'block_size')}")
    if name != "steps_per_block":
        steps = setting(decoder, "steps_per_block")
        parts.append("steps = block" if steps == setting(decoder, "block_size") else f"{steps} steps")
    if name != "threshold" and "threshold" in decoder.params:
        parts.append(f"threshold {decoder.params['threshold']:g}")
    return ", ".join([*parts, *unusual(decoder, without=(name,))])


def series(name: str, label: str, figures: Sequence[PointFigure]) -> tuple[Series, ...]:
    """One family's figures over a setting, those that are alike together.

    What says most of a point comes first; what was measured on something else follows only where it has further
    points.
    """
    groups: dict[MeasuredOn, dict[float, PointFigure]] = {}
    for figure in figures:
        value = number(figure.candidate.decoder, name)
        assert value is not None, "families are of decoders that have the setting"
        groups.setdefault(figure.on, {})[value] = figure
    found: list[Series] = []
    seen: set[float] = set()
    for on in sorted(groups, key=lambda on: (on.wanted, -len(groups[on]), on.run_ids, on.same)):
        if groups[on].keys() <= seen:
            continue
        seen |= groups[on].keys()
        found.append(Series(label=label, on=on, figures=tuple(sorted(groups[on].items()))))
    return tuple(found)
