"""Operating points: their names, quality at one, and how cells of the two arms are paired."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.chance import AgainstChance
from twotower_eval.analyse.compare.clean import CleanQuality, Flagged
from twotower_eval.analyse.compare.figures import Counts, Measured
from twotower_eval.analyse.compare.wholes import WholeScore
from twotower_eval.errors import UserError
from twotower_eval.records import (
    Cell,
    Checkpoint,
    DecoderSpec,
    Estimate,
    Finding,
    Scalar,
    Workload,
    canonical_json,
    sha256_text,
    to_json,
)
from twotower_eval.store import Run

NAMED = ("block_size", "steps_per_block", "threshold")  # parameters with a place of their own in a name


def checkpoint_name(checkpoint: Checkpoint) -> str:
    """A checkpoint's name, with its tower if only one is meant."""
    return checkpoint.name + tower_suffix(checkpoint)


def tower_suffix(checkpoint: Checkpoint) -> str:
    """What stands behind a checkpoint's name where only one tower is meant."""
    return f" ({checkpoint.tower} tower)" if checkpoint.tower else ""


def setting(decoder: DecoderSpec, name: str) -> Scalar:
    """A decoder's parameter, ``None`` without it; open steps are the block size."""
    value = decoder.params.get(name)
    return decoder.params.get("block_size") if name == "steps_per_block" and value is None else value


def number(decoder: DecoderSpec, name: str) -> float | None:
    """A decoder's numeric parameter; ``None`` without it, and for a switch or a word."""
    value = setting(decoder, name)
    return None if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)


def long_name(decoder: DecoderSpec) -> str:
    """``block 16, 16 steps, threshold 0.8`` for what has these; other parameters follow (see :func:`unusual`)."""
    if not _has_blocks(decoder):
        return ", ".join(unusual(decoder))
    parts = [f"block {setting(decoder, 'block_size')}", f"{setting(decoder, 'steps_per_block')} steps"]
    if "threshold" in decoder.params:
        parts.append(f"threshold {decoder.params['threshold']:g}")
    return ", ".join([*parts, *unusual(decoder)])


def short_name(decoder: DecoderSpec) -> str:
    """``16/16/0.8``: block size, steps, threshold; a decoder without blocks has no shorter name."""
    if not _has_blocks(decoder):
        return long_name(decoder)
    parts = [f"{setting(decoder, name)}" for name in ("block_size", "steps_per_block")]
    if "threshold" in decoder.params:
        parts.append(f"{decoder.params['threshold']:g}")
    return ", ".join(["/".join(parts), *unusual(decoder)])


def _has_blocks(decoder: DecoderSpec) -> bool:
    """Whether block size and steps of a block are what a decoder is called by."""
    own = not decoder.is_plug_in and "steps_per_block" not in decoder.params
    return "block_size" in decoder.params and not own


def code_name(decoder: DecoderSpec) -> str:
    """Names the code of a plug-in by its digest."""
    if decoder.code is None:
        return "code not recorded"
    return f"code {sha256_text(canonical_json([[file.name, file.sha256] for file in decoder.code]))[:8]}"


def unusual(decoder: DecoderSpec, *, without: Collection[str] = ()) -> list[str]:
    """The kind, unless it is block diffusion, and each parameter that :func:`long_name` has no words for.

    For our decoders, those that are on; for a plug-in, whose defaults are unknown, all but ``None`` and a temperature
    of 0. A switch for traces is left out, as it changes no answer. An approximate cache is named.
    """
    named = (*(NAMED if _has_blocks(decoder) else ()), "trace", *without)
    kind = [] if decoder.kind == "block_diffusion" else [decoder.kind]
    told = [
        f"{name.replace('_', ' ')} {json.dumps(value)}"
        for name, value in decoder.params.items()
        if name not in named and (value or (decoder.is_plug_in and value is not None and name != "temperature"))
    ]
    return [*kind, *told, *(["approximate cache"] if decoder.approximate else [])]


NOT_EXERCISING = ("context_tower", "exact")  # likelihoods in which the parallel decoder has no part


class PointKey(NamedTuple):
    """An operating point without its workload: a checkpoint's identity, tower and dtype, and the full decoder."""

    checkpoint: str
    tower: str | None
    dtype: str
    decoder: str


@dataclass(frozen=True, kw_only=True)
class TaskQuality:
    """One task that counts once in the average; ``members`` are (name, documents, baseline, candidate) if it has any,
    weighted ``by_size`` or equally.

    ``scored_by`` are the candidate's ways of scoring, for a group maybe several. Means lie between 0 and 1 for the
    usual metrics. ``equal_by_construction``: one computation scored both arms, on tensors that they share.
    ``above_chance``: the retention above chance.
    """

    name: str
    metric: str
    filter: str
    scored_by: tuple[str, ...]
    num_documents: int
    num_clusters: int
    num_discordant: int
    equal_by_construction: bool
    baseline: float
    candidate: float
    retention: Measured
    standing: stats.Standing
    above_chance: Measured
    members: tuple[tuple[str, int, float, float], ...]
    by_size: bool
    flips: stats.Flips

    @property
    def exercises_decoder(self) -> bool:
        """Whether the candidate's decoder had a part in these scores."""
        return not set(self.scored_by) <= set(NOT_EXERCISING)


@dataclass(frozen=True, kw_only=True)
class OtherScore:
    """A mean score outside retention: another metric or filter, or one of which less is better.

    ``main``: the task's main score. ``members`` are a group's. ``is_equal``: one computation scored both arms.
    """

    task: str
    metric: str
    filter: str
    scored_by: tuple[str, ...]
    higher_is_better: bool
    num_documents: int
    baseline: float
    candidate: float
    difference: Estimate
    main: bool
    members: tuple[str, ...]
    is_equal: bool
    scores: stats.PairedScores

    def score_at(self, level: float) -> Estimate:
        """The candidate's score with its interval at that level; NoEstimate where there is none."""
        return candidate_mean(self.scores, level)

    def difference_at(self, level: float) -> Estimate:
        """Candidate minus baseline at that level; NoEstimate where there is none."""
        if self.is_equal:
            return stats.equal_by_construction(0.0, len(set(self.scores.clusters)), level=level)
        table = self.scores.table
        return stats.difference(table, stats.draw_task_means(table), level=level, min_discordant=stats.MIN_DISCORDANT)


def candidate_mean(scores: stats.PairedScores, level: float) -> Estimate:
    """The candidate's mean over one task or over a group's members; NoEstimate where there is no interval."""
    return stats.mean_of_members(
        scores.candidate, scores.tasks, scores.clusters, by_size=bool(scores.by_size), level=level
    )


@dataclass(frozen=True, kw_only=True)
class MissingScore:
    """Documents of a task without a value in one arm, all for the same reason."""

    arm: str
    task: str
    metric: str
    filter: str
    headline: bool
    reason: str
    doc_ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class QualityPoint:
    """Quality at one operating point in one run; ``scores`` are those behind retention, ``None`` without any.

    ``documents_sha256`` is over these documents with their prompts and targets.
    """

    run_id: str
    complete: bool
    baseline: Cell
    candidate: Cell
    tasks: tuple[TaskQuality, ...]
    headline: Measured
    exercised: Measured
    mean_of_ratios: Measured
    leave_one_out: tuple[tuple[str, float], ...]
    chance: AgainstChance
    others: tuple[OtherScore, ...]
    wholes: tuple[WholeScore, ...]
    missing: tuple[MissingScore, ...]
    warnings: tuple[Finding, ...]
    counts: Counts
    baseline_counts: Counts
    flagged: Flagged
    clean: CleanQuality
    scores: stats.PairedScores | None
    documents_sha256: str

    @cached_property
    def key(self) -> PointKey:
        """Joins quality and speed of the same weights, dtype and decoder."""
        return point_key(self.candidate)

    @property
    def timed(self) -> bool:
        """Whether these are the scored outputs of timed calls."""
        return self.candidate.workload.kind != "task"

    @property
    def all_exercise_decoder(self) -> bool:
        """Whether the decoder answers every task, so that both retentions are equal."""
        return all(task.exercises_decoder for task in self.tasks)

    @property
    def equal_tasks(self) -> tuple[str, ...]:
        """Tasks that cannot differ between the arms."""
        return tuple(task.name for task in self.tasks if task.equal_by_construction)


def point_key(cell: Cell) -> PointKey:
    """The operating point of a cell; the same weights in another dtype are another point."""
    checkpoint = cell.checkpoint
    return PointKey(checkpoint.identity, checkpoint.tower, checkpoint.dtype, canonical_json(to_json(cell.decoder)))


def baseline_of(run: Run, candidate: Cell) -> Cell:
    """The baseline cell on the same workload (device count apart); a UserError if there is not exactly one."""
    found = [
        cell
        for cell in run.manifest.cells
        if cell.arm == "baseline" and _comparable(cell.workload) == _comparable(candidate.workload)
    ]
    if len(found) != 1:
        what = f"{candidate.workload.name!r} of cell {candidate.id}"
        raise UserError(f"run {run.manifest.run_id}: {len(found)} baseline cells for workload {what}, not one")
    return found[0]


def _comparable(workload: Workload) -> Workload:
    return dataclasses.replace(workload, num_devices=None)


def cells_of(run: Run, point: QualityPoint) -> tuple[set[str], set[str]]:
    """The ids of a point's cells in its run: those of the baseline and those of the candidate."""
    workload = point.candidate.workload
    candidates = [
        cell
        for cell in run.manifest.cells
        if cell.arm == "candidate" and point_key(cell) == point.key and cell.workload.batch_size == workload.batch_size
    ]
    return {baseline_of(run, cell).id for cell in candidates}, {cell.id for cell in candidates}
