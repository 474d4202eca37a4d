"""From score rows to a report's quality: baseline and candidate paired document by document."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.chance import NOT_CLEAR, AgainstChance, against_chance, chances
from twotower_eval.analyse.compare.clean import (
    CleanQuality,
    Flags,
    OutputKey,
    clean_quality,
    flagged,
    flagged_documents,
    outputs,
)
from twotower_eval.analyse.compare.figures import ArmsDifferError, Counts, Measured, count, measured, once
from twotower_eval.analyse.compare.points import (
    MissingScore,
    OtherScore,
    PointKey,
    QualityPoint,
    TaskQuality,
    baseline_of,
    point_key,
)
from twotower_eval.analyse.compare.warned import (
    LoneClusters,
    NoHeadline,
    StandardErrorsDiffer,
    Unpaired,
    unlike_arms,
    unlike_scoring,
)
from twotower_eval.analyse.compare.wholes import current_scores, is_whole, whole_groups, whole_scores
from twotower_eval.errors import UserError
from twotower_eval.records import Cell, Finding, Score, canonical_json, sha256_text
from twotower_eval.store import Run

Pair = tuple[Score, Score]
Key = tuple[str, int, str, str]

ARMS = ("baseline", "candidate")
SAME = ("doc_sha256", "prompt_sha256", "target_sha256", "cluster_id", "group", "headline", "chance", "aggregation")
NOT_GIVEN = "the task's own code gives none for this answer"


@dataclass(frozen=True, kw_only=True)
class Pairing:
    """Scores of a baseline's and a candidate's cell on the same workload.

    ``lone`` holds, by arm, scores of documents that both arms answered but for which the other arm has no such metric.
    ``num_unanswered`` scores wait for the other arm's answer in incomplete runs.
    """

    pairs: tuple[Pair, ...]
    lone: tuple[tuple[Score, ...], tuple[Score, ...]]
    num_unanswered: int


def paired(run: Run, cells: tuple[Cell, Cell], by_cell: Mapping[str, Sequence[Score]]) -> Pairing:
    """Baseline's and candidate's scores of the same document, metric and filter.

    ArmsDifferError where they cannot be paired, or where an arm of a complete run lacks an answer.
    """
    by_key = [{_key(score): score for score in by_cell[cell.id]} for cell in cells]
    answered = [{(score.task, score.doc_id) for score in by_cell[cell.id]} for cell in cells]
    one_armed = sorted(by_key[0].keys() ^ by_key[1].keys())
    # Before the end an answer may be there that is not scored yet.
    waiting = [key for key in one_armed if not (run.complete and all(key[:2] in found for found in answered))]
    if waiting and run.complete:
        task, doc_id, metric, _ = waiting[0]
        where = f"task {task!r}, document {doc_id}, metric {metric!r}"
        raise ArmsDifferError(f"run {run.manifest.run_id}: {where} is scored in one arm only: the runs are no pair")
    pairs = tuple((by_key[0][key], by_key[1][key]) for key in sorted(by_key[0].keys() & by_key[1].keys()))
    for pair in pairs:
        _check_alike(run, *pair)
    lone = [key for key in one_armed if key not in set(waiting)]
    baseline, candidate = (tuple(scores[key] for key in lone if key in scores) for scores in by_key)
    return Pairing(pairs=pairs, lone=(baseline, candidate), num_unanswered=len(waiting))


def _key(score: Score) -> Key:
    return (score.task, score.doc_id, score.metric, score.filter)


def _check_alike(run: Run, a: Score, b: Score) -> None:
    for name in SAME:
        if getattr(a, name) != getattr(b, name):
            where = f"run {run.manifest.run_id}: task {a.task!r}, document {a.doc_id}"
            raise ArmsDifferError(f"{where}: {name} differs between baseline and candidate")


def lone_scores(found: Iterable[Pairing]) -> tuple[list[Score], list[Score]]:
    """By arm, the scores that the other arm's answers did not get."""
    pairings = list(found)
    baseline, candidate = ([score for one in pairings for score in one.lone[arm]] for arm in (0, 1))
    return baseline, candidate


def missing_scores(found: Iterable[Pairing]) -> Iterator[MissingScore]:
    """Documents without a value under a metric that is a mean, by arm and reason."""
    groups: dict[tuple[str, str, str, str, bool, str], list[int]] = defaultdict(list)
    for one in found:
        for pair in one.pairs:
            for arm, score in zip(ARMS, pair, strict=True):
                if score.value is None and not is_whole(score):
                    reason = score.missing_reason or "no reason recorded"
                    groups[arm, *_named(score), reason].append(score.doc_id)
        for other, scores in zip(reversed(ARMS), one.lone, strict=True):
            for score in scores:
                if not is_whole(score):
                    groups[other, *_named(score), NOT_GIVEN].append(score.doc_id)
    for (arm, task, metric, filter_, headline, reason), doc_ids in groups.items():
        yield MissingScore(
            arm=arm,
            task=task,
            metric=metric,
            filter=filter_,
            headline=headline,
            reason=reason,
            doc_ids=tuple(doc_ids),
        )


def _named(score: Score) -> tuple[str, str, str, bool]:
    return score.task, score.metric, score.filter, score.headline


STDERR_TOLERANCE = 0.2


def quality_points(run: Run) -> list[QualityPoint]:
    """Every operating point of a run that has scores, in the manifest's order."""
    by_cell: dict[str, list[Score]] = defaultdict(list)
    for score in current_scores(run):
        by_cell[score.cell].append(score)
    groups: dict[tuple[PointKey, str, int | None], list[Cell]] = defaultdict(list)
    for cell in run.manifest.cells:
        if cell.arm == "candidate":
            kind = "task" if cell.workload.kind == "task" else cell.workload.name
            groups[point_key(cell), kind, cell.workload.batch_size].append(cell)
    return [_point(run, cells, by_cell) for cells in groups.values() if any(cell.id in by_cell for cell in cells)]


def _point(run: Run, cells: list[Cell], by_cell: dict[str, list[Score]]) -> QualityPoint:
    baselines = [baseline_of(run, cell) for cell in cells]
    found = [paired(run, (a, b), by_cell) for a, b in zip(baselines, cells, strict=True)]
    pairs = [pair for one in found for pair in one.pairs]
    unpaired = sum(one.num_unanswered for one in found)
    missing = tuple(missing_scores(found))
    usable = [(a, b) for a, b in pairs if a.value is not None and b.value is not None and not is_whole(a)]
    headline = [pair for pair in usable if pair[0].headline and pair[0].higher_is_better]
    others = [pair for pair in usable if not (pair[0].headline and pair[0].higher_is_better)]
    answered_once = _tasks_answered_once(run, cells, baselines)
    scores = _scores(headline, chances(run, [a for a, _ in headline]))
    found_tasks = _headline_quality(scores, headline, answered_once)
    warnings = [*unlike_arms(baselines[0], cells[0]), *unlike_scoring(usable), *found_tasks.pop("warnings")]
    if unpaired:
        gone = Unpaired(num_scores=unpaired)
        warnings.append(Finding(kind="unpaired_scores", severity="note", facts=gone))
    num_missing = len({(gap.task, doc_id) for gap in missing if gap.headline for doc_id in gap.doc_ids})
    if num_missing:
        lacking = NoHeadline(num_documents=num_missing)
        warnings.append(Finding(kind="unscored_documents", severity="note", facts=lacking))
    ids, baseline_ids = {cell.id for cell in cells}, {cell.id for cell in baselines}
    of_baseline = once([run], ("outputs", frozenset(baseline_ids)), lambda: _outputs(run, baseline_ids))
    by_arm = [of_baseline[0], outputs(run.manifest.run_id, run.generations_of(ids), ids)]
    clusters = {(a.task, a.doc_id): a.cluster_id for a, _ in pairs}
    return QualityPoint(
        run_id=run.manifest.run_id,
        complete=run.complete,
        baseline=baselines[0],
        candidate=cells[0],
        others=tuple(_others(others, answered_once, whole_groups(a for a, _ in pairs))),
        wholes=tuple(whole_scores(run, pairs, lone_scores(found), answered_once)),
        missing=missing,
        warnings=tuple(warnings),
        counts=count(row.generation for row in run.generations_of(ids)),
        baseline_counts=of_baseline[1],
        flagged=flagged(by_arm[0], by_arm[1], clusters),
        clean=_clean(scores, headline, [flagged_documents(arm) for arm in by_arm]),
        scores=scores if headline else None,
        documents_sha256=_documents_sha256(headline, baselines),
        **found_tasks,
    )


def _outputs(run: Run, cells: set[str]) -> tuple[dict[OutputKey, Flags], Counts]:
    rows = run.generations_of(cells)
    return outputs(run.manifest.run_id, rows, cells), count(row.generation for row in rows)


def _documents_sha256(headline: list[Pair], baselines: list[Cell]) -> str:
    """A digest of the documents, their prompts and their budgets."""
    asked = [[a.task, a.doc_id, a.doc_sha256, a.prompt_sha256, a.target_sha256, a.metric] for a, _ in headline]
    return sha256_text(canonical_json([asked, [cell.workload.max_new_tokens for cell in baselines]]))


def _scores(pairs: list[Pair], chance: Sequence[float] = ()) -> stats.PairedScores:
    groups: dict[str, str | None] = {}
    for score, _ in pairs:
        if groups.setdefault(score.task, score.group) != score.group:
            raise UserError(f"task {score.task!r} has scores of two groups, {groups[score.task]} and {score.group}")
    return stats.PairedScores(
        tasks=[a.task for a, _ in pairs],
        groups=[a.group or a.task for a, _ in pairs],
        clusters=[a.cluster_id for a, _ in pairs],
        baseline=[a.value for a, _ in pairs if a.value is not None],
        candidate=[b.value for _, b in pairs if b.value is not None],
        chance=chance,
        by_size=frozenset(a.group for a, _ in pairs if a.group and a.by_size),
    )


def _tasks_answered_once(run: Run, cells: list[Cell], baselines: list[Cell]) -> set[str]:
    """Tasks whose log-likelihoods were computed once for both arms, as their tensors are equal."""
    answering = {row.cell for row in run.likelihoods}
    once = set()
    for cell, baseline in zip(cells, baselines, strict=True):
        if baseline.likelihoods_of is not None:  # beside other baselines, whose log-likelihoods may serve these cells
            if cell.likelihoods_of == baseline.likelihoods_of:
                once.add(cell.workload.name)
            continue
        others = {other.id for other in run.manifest.cells if other.workload == cell.workload} - {baseline.id}
        if baseline.id in answering and not others & answering:
            once.add(cell.workload.name)
    return once


def _headline_quality(scores: stats.PairedScores, pairs: list[Pair], answered_once: set[str]) -> dict[str, Any]:
    """The retention and its parts, as fields of a QualityPoint."""
    if not pairs:
        none = Measured(estimate=None, reason="no task with a headline score")
        fields = {"headline": none, "exercised": none, "mean_of_ratios": none, "leave_one_out": ()}
        chance = AgainstChance(standings=(), headline=none, exercised=none, clear_headline=none, clear_exercised=none)
        return {"tasks": (), "warnings": (), "chance": chance, **fields}
    table, draws = scores.table, scores.draws
    flips = {found.task: found for found in stats.flips(scores)}
    standings = stats.standings(table)
    tasks = tuple(
        _task_quality(standing, pairs, table, draws, flips[standing.task], answered_once) for standing in standings
    )
    exercising = [task.name for task in tasks if task.exercises_decoder]
    all_equal = all(task.equal_by_construction and task.baseline > 0 for task in tasks)
    exercised = Measured(estimate=None, reason="no task is scored through the candidate's decoder")
    if exercising:
        exercised = measured(lambda: stats.retention(table, draws, table.weights_K(exercising)))
    equal = Measured(estimate=stats.equal_by_construction(1.0, len(table.stratum_C)))
    return {
        "tasks": tasks,
        "headline": equal if all_equal else measured(lambda: stats.retention(table, draws)),
        "exercised": exercised,
        "mean_of_ratios": equal if all_equal else measured(lambda: stats.mean_of_ratios(table, draws)),
        "leave_one_out": stats.leave_one_out(table),
        "chance": against_chance(
            table, draws, standings, exercising, [task.name for task in tasks if task.equal_by_construction]
        ),
        "warnings": tuple(_interval_warnings(table, draws)),
    }


def _task_quality(
    standing: stats.Standing,
    pairs: list[Pair],
    table: stats.ScoreTable,
    draws: stats.Draws,
    flips: stats.Flips,
    answered_once: set[str],
) -> TaskQuality:
    name = standing.task
    here = [(a, b) for a, b in pairs if (a.group or a.task) == name]
    metric_of = _headline_metrics(here)
    metric, filter_ = min(metric_of.values())
    weights_K = table.weights_K([name])
    num_discordant, num_clusters = stats.num_discordant(table, weights_K)
    k = table.tasks.index(name)
    equal = num_discordant == 0 and metric_of.keys() <= answered_once
    right = equal and table.leaf_means_L(table.baseline_CL).any()
    known = Measured(estimate=stats.equal_by_construction(1.0, num_clusters)) if right else None
    kept = known or measured(lambda: stats.retention(table, draws, weights_K))
    above = kept if standing.chance is None else Measured(estimate=None, reason=NOT_CLEAR)
    if standing.chance is not None and standing.is_clear:
        above = known or measured(lambda: stats.retention_above_chance(table, draws, weights_K))
    return TaskQuality(
        name=name,
        metric=metric,
        filter=filter_,
        scored_by=tuple(sorted({b.scored_by for _, b in here})),
        num_documents=len(here),
        num_clusters=num_clusters,
        num_discordant=num_discordant,
        equal_by_construction=equal,
        baseline=standing.baseline,
        candidate=float(table.task_means_K(table.candidate_CL)[k]),
        retention=kept,
        standing=standing,
        above_chance=above,
        members=_members(table, k),
        by_size=name in table.by_size,
        flips=flips,
    )


def _members(table: stats.ScoreTable, k: int) -> tuple[tuple[str, int, float, float], ...]:
    """Name, number of documents and both means of each member of a task; empty for a single task."""
    means_L = table.leaf_means_L(table.baseline_CL), table.leaf_means_L(table.candidate_CL)
    members = [
        (leaf, int(table.count_CL[:, i].sum()), float(means_L[0][i]), float(means_L[1][i]))
        for i, leaf in enumerate(table.leaves)
        if table.task_of_leaf_L[i] == k
    ]
    return tuple(members) if len(members) > 1 else ()


def _headline_metrics(pairs: Sequence[Pair]) -> dict[str, tuple[str, str]]:
    """Metric and filter of each task's headline score; UserError where one has several."""
    found: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for score, _ in pairs:
        found[score.task].add((score.metric, score.filter))
    for task, metrics in found.items():
        if len(metrics) > 1:
            listed = ", ".join(" / ".join(metric) for metric in sorted(metrics))
            raise UserError(f"task {task!r} has several headline scores ({listed}): mark one")
    return {task: min(metrics) for task, metrics in found.items()}


def _clean(scores: stats.PairedScores, headline: list[Pair], dropped: list[set[tuple[str, int]]]) -> CleanQuality:
    return clean_quality(scores, [(a.task, a.doc_id) for a, _ in headline], (dropped[0], dropped[1]))


def _interval_warnings(table: stats.ScoreTable, draws: stats.Draws) -> Iterator[Finding]:
    weights_K = table.weights_K()
    drawn = stats.bootstrap_stderr(draws, weights_K)
    linear = 0.0 if drawn is None else stats.linear_stderr(table, weights_K)  # the baseline may be 0 everywhere
    if drawn is not None and linear > 0 and abs(drawn / linear - 1) > STDERR_TOLERANCE:
        differ = StandardErrorsDiffer(bootstrap=drawn, linear=linear, tolerance=STDERR_TOLERANCE)
        yield Finding(kind="standard_errors_differ", severity="warning", facts=differ)
    lone = stats.num_lone_clusters(table)
    if lone:
        yield Finding(kind="lone_clusters", severity="warning", facts=LoneClusters(num_clusters=lone))


def _others(
    pairs: list[Pair], answered_once: set[str], apart: Container[tuple[str | None, str, str]]
) -> Iterator[OtherScore]:
    """Scores outside retention by task and metric, then by group; ``apart``: groups whose score is not a mean over
    documents.
    """
    tasks: dict[tuple[str, str, str], list[Pair]] = defaultdict(list)
    groups: dict[tuple[str, str, str], list[Pair]] = defaultdict(list)
    for a, b in pairs:
        tasks[a.task, a.metric, a.filter].append((a, b))
        if a.group is not None and (a.group, a.metric, a.filter) not in apart:
            groups[a.group, a.metric, a.filter].append((a, b))
    for (task, *_), here in sorted(tasks.items()):
        yield _other(task, here, answered_once, ())
    for (group, *_), here in sorted(groups.items()):
        yield _other(group, here, answered_once, tuple(dict.fromkeys(a.task for a, _ in here)))


def _other(name: str, here: list[Pair], answered_once: set[str], members: tuple[str, ...]) -> OtherScore:
    first, scores = here[0][0], _scores(here)
    table = scores.table
    equal = all(a.task in answered_once and a.value == b.value for a, b in here)
    known = stats.equal_by_construction(0.0, len(table.stratum_C)) if equal else None
    return OtherScore(
        task=name,
        metric=first.metric,
        filter=first.filter,
        scored_by=tuple(sorted({b.scored_by for _, b in here})),
        higher_is_better=first.higher_is_better,
        num_documents=len(here),
        baseline=float(table.task_means_K(table.baseline_CL)[0]),
        candidate=float(table.task_means_K(table.candidate_CL)[0]),
        difference=known or stats.difference(table, stats.draw_task_means(table)),
        main=bool(first.main or members),
        members=members,
        is_equal=equal,
        scores=scores,
    )
