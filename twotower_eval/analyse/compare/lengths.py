"""How long answers are: those of timed prompts beside those of all documents, and what that says of timed calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.calls import Lane
from twotower_eval.analyse.compare.figures import once
from twotower_eval.analyse.compare.points import point_key
from twotower_eval.records import Arm, Cell, GenerationRow, SpeedSample, document_of
from twotower_eval.store import Run

Document = tuple[str, int]  # task, number
QUANTILES = (0.5, 0.9)
DIFFERS = 0.1  # on the log scale: mean lengths further apart are warned of
FEW_AT_BUDGET = 0.01  # share of all answers that run on to the budget while none of the timed ones does


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Useful tokens of one arm's answers, sorted: those of the timed prompts, and all of the tasks; ``all_tokens`` is
    empty where no run has them. ``whole``: the tasks have no further documents. ``budget`` is the largest of the timed
    calls.
    """

    arm: Arm
    timed_tokens: tuple[float, ...]
    all_tokens: tuple[float, ...]
    budget: int | None
    run_ids: tuple[str, ...] = ()
    whole: bool = False

    def quantiles(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Quantiles of the timed answers and of all; the latter empty where they are not known."""
        timed, every = (
            tuple(float(np.quantile(tokens, q)) for q in QUANTILES) if tokens else ()
            for tokens in (self.timed_tokens, self.all_tokens)
        )
        return timed, every

    def shares_at_budget(self) -> tuple[float, float] | None:
        """Shares of the timed and of all answers that reach the budget; ``None`` where not known."""
        if self.budget is None or not self.all_tokens:
            return None
        timed, every = (
            float(np.mean(np.asarray(tokens) >= self.budget)) for tokens in (self.timed_tokens, self.all_tokens)
        )
        return timed, every

    @property
    def misses_the_tail(self) -> bool:
        """Whether the timed answers clearly differ from all in their mean length or in how many reach the budget."""
        if not self.all_tokens:
            return False
        means = [max(float(np.mean(tokens)), 0.5) for tokens in (self.timed_tokens, self.all_tokens)]
        shares = self.shares_at_budget() or (0.0, 0.0)
        return abs(float(np.log(means[0] / means[1]))) > DIFFERS or (shares[0] == 0 and shares[1] > FEW_AT_BUDGET)


@dataclass(frozen=True, kw_only=True)
class _Arm:
    """One arm's timed calls, and the tokens of its documents; of the tasks in ``whole``, a run has all documents."""

    cell: Cell
    samples: Sequence[SpeedSample]
    timed: Mapping[Document, float]
    every: Mapping[Document, float]
    whole: frozenset[str]
    run_ids: tuple[str, ...]

    @property
    def longest(self) -> list[int]:
        """Tokens of each call's longest answer, which decides its time."""
        return [max(prompt.num_tokens for prompt in sample.prompts) for sample in self.samples]

    def tokens_of(self, document: Document) -> float:
        """Tokens of a document, from a ``run`` where it has them, else as timed."""
        return self.every[document] if document in self.every else self.timed[document]


def with_lengths(
    timed: stats.TimedCalls,
    everyone: Sequence[Run],
    lanes: tuple[Lane, Lane],
) -> tuple[stats.TimedCalls, tuple[Lengths, ...]]:
    """The calls with all known answer lengths, and the lengths themselves.

    Unchanged for fixed calls and where prompt ids name no documents: then there are no further ones.
    """
    arms = [once(everyone, ("lengths", lane), partial(_arm, everyone, lane.cell, lane.samples)) for lane in lanes]
    baseline, candidate = arms
    if timed.fixed or not baseline.timed or not candidate.timed:
        return timed, ()
    # A document that only one arm has says nothing of a ratio.
    known = {*baseline.every.keys() & candidate.every.keys()}
    tasks = {task for task, _ in baseline.timed}
    if {task for task, _ in known} != tasks:
        known = set()
    whole = bool(known) and tasks <= baseline.whole & candidate.whole and known >= baseline.timed.keys()
    lengths = tuple(
        Lengths(
            arm=arm.cell.arm,
            timed_tokens=tuple(sorted(arm.timed.values())),
            all_tokens=tuple(sorted(arm.every[document] for document in known)),
            budget=arm.cell.workload.max_new_tokens,
            run_ids=arm.run_ids if known else (),
            whole=whole,
        )
        for arm in arms
    )
    documents = _documents(baseline, candidate, known, whole) if known else None
    return replace(timed, limits_s=_limits(baseline, candidate), documents=documents), lengths


def _arm(everyone: Sequence[Run], cell: Cell, samples: Sequence[SpeedSample]) -> _Arm:
    timed: dict[Document, list[int]] = {}
    for prompt in (prompt for sample in samples for prompt in sample.prompts):
        document = document_of(prompt.prompt_id)
        if document is not None:
            timed.setdefault(document, []).append(prompt.num_tokens)
    tasks = {task for task, _ in timed}
    found: dict[Document, float] = {}
    whole: set[str] = set()
    run_ids = []
    for run in (run for run in everyone if run.manifest.verb == "run"):
        own = {other.id: other for other in run.manifest.cells if _same_point(cell, other)}
        rows = [row for row in run.generations_of(own) if row.task in tasks and row.repeat == 0]
        budget = max((own[row.cell].workload.max_new_tokens or 0 for row in rows), default=0)
        if rows and budget >= (cell.workload.max_new_tokens or 0):  # else its answers were cut earlier
            found |= {(row.task, row.doc_id): float(row.generation.num_tokens) for row in rows}
            whole |= _whole_tasks(run, rows)
            run_ids.append(run.manifest.run_id)
    means = {document: float(np.mean(tokens)) for document, tokens in timed.items()}
    return _Arm(cell=cell, samples=samples, timed=means, every=found, whole=frozenset(whole), run_ids=tuple(run_ids))


def _whole_tasks(run: Run, rows: Sequence[GenerationRow]) -> set[str]:
    """Tasks of which a complete run has all documents."""
    if not run.complete:
        return set()
    limit, documents = run.manifest.plan.get("limit"), {(row.task, row.doc_id) for row in rows}
    numbers = Counter(task for task, _ in documents)
    return {task for task, num in numbers.items() if limit is None or (isinstance(limit, int) and num < limit)}


def _same_point(cell: Cell, other: Cell) -> bool:
    """Whether another cell has the same weights and decoder."""
    return other.workload.kind == "task" and other.arm == cell.arm and point_key(other) == point_key(cell)


def _documents(baseline: _Arm, candidate: _Arm, known: set[Document], whole: bool) -> stats.Documents:
    """Lengths of the timed tasks' documents, with the timed ones; every task weighs as much as among the timed ones."""
    documents = sorted(known | (baseline.timed.keys() & candidate.timed.keys()))
    timed, every = Counter(task for task, _ in baseline.timed), Counter(task for task, _ in documents)
    budgets = baseline.cell.workload.max_new_tokens, candidate.cell.workload.max_new_tokens
    return stats.Documents(
        baseline_tokens=np.array([baseline.tokens_of(document) for document in documents]),
        candidate_tokens=np.array([candidate.tokens_of(document) for document in documents]),
        longest_baseline=float(max(baseline.longest)),
        longest_candidate=float(max(candidate.longest)),
        batch_size=candidate.cell.workload.prompts_per_call,
        weights=np.array([timed[task] / every[task] for task, _ in documents]),
        whole=whole,
        budgets=None if budgets[0] is None or budgets[1] is None else (float(budgets[0]), float(budgets[1])),
    )


def _limits(baseline: _Arm, candidate: _Arm) -> tuple[float, float] | None:
    """Seconds of each arm's call whose longest answer runs on to the budget.

    Such an answer may gain nothing: a loop commits one token a forward. So the candidate's seconds per further token
    are at least the baseline's.
    """
    found: list[float] = []
    least = 0.0
    for arm in (baseline, candidate):
        budget = arm.cell.workload.max_new_tokens
        if budget is None:
            return None
        wall_s, longest = np.array([sample.wall_s for sample in arm.samples]), np.array(arm.longest, dtype=float)
        least = max(least, stats.seconds_per_token(wall_s, longest))
        found.append(float(wall_s.mean() + least * max(0.0, budget - longest.mean())))
    return found[0], found[1]
