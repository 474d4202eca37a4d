"""Worlds in which scores are known: documents, clusters and tasks as benchmarks have them, scores drawn at random.

Each world keeps its documents and draws new scores for every repetition, independently from cluster to cluster, so
that the true retention is the ratio of the expected scores, and so on. Shape letters as in ``stats.intervals``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from twotower_eval.analyse import stats

Floats = NDArray[np.float64]
Scores = tuple[Floats, Floats]  # baseline, candidate: one entry per document
Quantity = Literal["retention", "mean of ratios", "score difference", "score"]
PAPER = (  # accuracy of the baseline in percent, and documents, of the published 11 tasks; the largest cut to 2,000
    *((78.56, 2_000), (62.59, 2_000), (91.72, 1_172), (76.09, 1_267), (88.90, 1_000), (79.27, 164), (74.71, 257)),
    *((92.49, 1_319), (84.40, 500), (73.97, 1_000), (80.80, 250)),
)


@dataclass(frozen=True, kw_only=True)
class QualityWorld:
    """A scenario: its expected scores, how a repetition's are drawn, and the quantity that is estimated.

    ``baseline`` and ``candidate`` are expected means over tasks, ``mean_ratio`` the mean of the tasks' own ratios where
    that is not theirs. A ``score`` is the candidate's alone.
    """

    name: str
    baseline: float
    candidate: float
    mean_ratio: float | None = None
    clusters: Sequence[str]
    draw_scores: Callable[[np.random.Generator], Scores]
    draw: Callable[[np.random.Generator], stats.ScoreTable]
    quantity: Quantity = "retention"

    @property
    def truth(self) -> float:
        """The true value of the quantity."""
        ratio = self.candidate / self.baseline
        return {
            "retention": ratio,
            "mean of ratios": ratio if self.mean_ratio is None else self.mean_ratio,
            "score difference": self.candidate - self.baseline,
            "score": self.candidate,
        }[self.quantity]


def world(
    name: str,
    means: tuple[float, float],
    draw_scores: Callable[[np.random.Generator], Scores],
    *,
    tasks: Sequence[str],
    clusters: Sequence[str],
    groups: Sequence[str] | None = None,
    mean_ratio: float | None = None,
) -> QualityWorld:
    """A world with one entry of ``tasks`` and ``clusters`` per document. Only the sums of scores change in a draw."""
    zeros = [0.0] * len(tasks)
    scores = stats.PairedScores(tasks=tasks, groups=groups or tasks, clusters=clusters, baseline=zeros, candidate=zeros)
    blank = scores.table
    leaf_N = np.unique(np.asarray(tasks), return_inverse=True)[1]
    cell_N = np.unique(np.asarray(clusters), return_inverse=True)[1] * len(blank.leaves) + leaf_N

    def draw(rng: np.random.Generator) -> stats.ScoreTable:
        a_N, b_N = draw_scores(rng)

        def summed(values_N: Floats) -> Floats:
            sums = np.bincount(cell_N, values_N, blank.count_CL.size).astype(np.float64)
            return sums.reshape(blank.count_CL.shape)

        return replace(
            blank,
            baseline_CL=summed(a_N),
            candidate_CL=summed(b_N),
            loss_CL=summed(np.maximum(a_N - b_N, 0)),
            gain_CL=summed(np.maximum(b_N - a_N, 0)),
            smallest_score=float(min(a_N.min(), b_N.min())),
            largest_score=float(max(a_N.max(), b_N.max())),
        )

    return QualityWorld(
        name=name, baseline=means[0], candidate=means[1], mean_ratio=mean_ratio,
        clusters=clusters, draw_scores=draw_scores, draw=draw,
    )  # fmt: skip


def flipped(rng: np.random.Generator, a_N: Floats, lost: float | Floats, gained: float | Floats) -> Floats:
    """Right answers lost and wrong ones gained with these probabilities."""
    u_N = rng.random(a_N.shape)
    flipped_N: Floats = np.where(a_N == 1, u_N >= lost, u_N < gained).astype(float)
    return flipped_N


def one_task(n: int, accuracy: float, lost: float, gained: float) -> QualityWorld:
    """Independent right-or-wrong documents; ``lost`` and ``gained`` are shares of all documents."""

    def draw(rng: np.random.Generator) -> Scores:
        a_N = (rng.random(n) < accuracy).astype(float)
        return a_N, flipped(rng, a_N, lost / accuracy, gained / (1 - accuracy) if accuracy < 1 else 0.0)

    name = f"1 task, accuracy {accuracy:g}, lost {100 * lost:g} %, gained {100 * gained:g} %"
    return world(name, (accuracy, accuracy - lost + gained), draw, tasks=["t"] * n, clusters=[str(i) for i in range(n)])


def equal_arms(n: int, accuracy: float) -> QualityWorld:
    """Two equally good, otherwise independent models near the ceiling: retention is 1."""

    def draw(rng: np.random.Generator) -> Scores:
        a_N, b_N = ((rng.random(n) < accuracy).astype(float) for _ in range(2))
        return a_N, b_N

    name = f"1 task, two equal and independent models of accuracy {accuracy:g}"
    return world(name, (accuracy, accuracy), draw, tasks=["t"] * n, clusters=[str(i) for i in range(n)])


def many_tasks(name: str, tasks: Sequence[tuple[float, int]], lost: float, gained: float) -> QualityWorld:
    """Tasks of (accuracy, documents), a share of all right answers lost and of all wrong ones gained in each."""
    p_N = np.concatenate([np.full(n, p) for p, n in tasks])
    names = [f"t{k:02d}" for k, (_, n) in enumerate(tasks) for _ in range(n)]

    def draw(rng: np.random.Generator) -> Scores:
        a_N = (rng.random(len(p_N)) < p_N).astype(float)
        return a_N, flipped(rng, a_N, lost, gained)

    a_K = np.array([p for p, _ in tasks])
    b_K = a_K * (1 - lost) + (1 - a_K) * gained
    means, ratio = (float(a_K.mean()), float(b_K.mean())), float((b_K / a_K).mean())
    clusters = [f"{t}/{i}" for i, t in enumerate(names)]
    return world(name, means, draw, tasks=names, clusters=clusters, mean_ratio=ratio)


def samples(num_problems: int, num_samples: int, scale: float) -> QualityWorld:
    """Several samples of each problem, alike within it: ability Beta(0.6, 0.4), ``scale`` times that for the other."""

    def draw(rng: np.random.Generator) -> Scores:
        ability_C1 = rng.beta(0.6, 0.4, (num_problems, 1))
        a_CS, b_CS = ((rng.random((num_problems, num_samples)) < ability_C1 * k).astype(float) for k in (1.0, scale))
        return a_CS.ravel(), b_CS.ravel()

    num = num_problems * num_samples
    clusters = [str(i // num_samples) for i in range(num)]
    name, mean = f"{num_samples} samples a problem, alike within it", 0.6 / (0.6 + 0.4)
    return world(name, (mean, scale * mean), draw, tasks=["t"] * num, clusters=clusters)


def languages(num_items: int, num_languages: int, num_more: int, lost: float, gained: float) -> QualityWorld:
    """Items in several languages, the first of which shares its items with a larger task, alike within an item."""
    codes = [f"m{k:02d}" for k in range(num_languages)]
    tasks = [code for code in codes for _ in range(num_items)] + ["big"] * (num_items + num_more)
    item_N = np.array([*(list(range(num_items)) * num_languages), *range(num_items + num_more)])
    hard, easy = 0.5, 0.98  # half of the items each

    def draw(rng: np.random.Generator) -> Scores:
        p_C = np.where(rng.random(num_items + num_more) < 0.5, hard, easy)
        frail_C = rng.random(num_items + num_more) < 0.5  # these lose answers, in every language
        a_N = (rng.random(len(item_N)) < p_C[item_N]).astype(float)
        return a_N, flipped(rng, a_N, 2 * lost * frail_C[item_N], 2 * gained * frail_C[item_N])

    p = (hard + easy) / 2
    return world(
        f"{num_languages} languages of {num_items} items, shared with a task of {num_items + num_more}",
        (p, p * (1 - lost) + (1 - p) * gained),
        draw,
        tasks=tasks,
        groups=["multi" if task != "big" else "big" for task in tasks],
        clusters=[f"i{item}" for item in item_N],
    )


def passages(num_passages: int, lost: float, gained: float) -> QualityWorld:
    """Passages with 1 to 8 questions each, hard and easy ones; a lost passage loses most of its answers."""
    sizes = [1 + (5 * i) % 8 for i in range(num_passages)]
    passage_N = np.repeat(np.arange(num_passages), sizes)

    def draw(rng: np.random.Generator) -> Scores:
        p_C = rng.beta(4, 1, num_passages)
        a_N = (rng.random(len(passage_N)) < p_C[passage_N]).astype(float)
        lost_C = np.where(rng.random(num_passages) < 0.2, 5 * lost, 0.0)
        return a_N, flipped(rng, a_N, lost_C[passage_N], gained)

    clusters = [str(i) for i in passage_N]
    means = (0.8, 0.8 * (1 - lost) + 0.2 * gained)
    return world("passages of 1 to 8 questions", means, draw, tasks=["t"] * len(clusters), clusters=clusters)


def graded(n: int, kept: float) -> QualityWorld:
    """Scores between 0 and 1 with a heavy share at 1, multiplied by a noisy factor for the candidate."""

    def draw(rng: np.random.Generator) -> Scores:
        a_N = np.minimum(1.0, 1.3 * rng.beta(2, 1, n))
        return a_N, a_N * rng.beta(18 * kept, 18 * (1 - kept), n)

    mean = 2 * 1.3 / 3 / 1.3**3 + 1 - 1 / 1.3**2  # of min(1, 1.3 x) where x has the density 2 x
    return world("graded scores", (mean, kept * mean), draw, tasks=["t"] * n, clusters=[str(i) for i in range(n)])


def quality_worlds() -> tuple[QualityWorld, ...]:
    """Small and large n, accuracies 0.02 to 0.99, few, many and one-sided flips, all kinds of cluster and quantity."""
    published = [(percent / 100, n) for percent, n in PAPER]
    tiny = [(0.8, 5), (0.6, 8), (0.9, 12), (0.5, 10)]
    return (
        *(one_task(n, 0.8, 0.10, 0.05) for n in (12, 20, 30, 50, 100)),
        *(one_task(n, 0.8, 0.06, 0.04) for n in (164, 500, 1_319, 2_000)),
        *(one_task(n, 0.99, 0.01, 0.005) for n in (164, 500, 2_000)),
        *(one_task(n, 0.05, 0.01, 0.01) for n in (164, 500, 2_000)),
        one_task(500, 0.02, 0.005, 0.005),
        *(one_task(n, 0.9, 0.02, 0.0) for n in (100, 500, 2_000)),
        *(one_task(n, 0.9, 0.0, 0.02) for n in (100, 500, 2_000)),
        *(one_task(n, 0.8, 0.0, 0.0) for n in (20, 164)),
        one_task(1_000, 0.8, 0.002, 0.001),
        *(one_task(n, 0.8, 0.79, 0.0) for n in (164, 1_000)),
        one_task(164, 0.8, 0.8, 0.0),
        *(equal_arms(n, accuracy) for n, accuracy in ((20, 0.95), (50, 0.98), (164, 0.99), (1_000, 0.98))),
        many_tasks("4 tasks of 5 to 12 documents", tiny, 0.15, 0.15),
        many_tasks("11 tasks as published", published, 0.04, 0.08),
        many_tasks("11 tasks as published, few flips", published, 0.002, 0.002),
        samples(30, 5, 0.9),
        samples(164, 20, 0.97),
        languages(50, 5, 100, 0.05, 0.05),
        languages(250, 11, 1_069, 0.03, 0.03),
        passages(40, 0.05, 0.05),
        passages(300, 0.05, 0.05),
        graded(25, 0.95),
        graded(500, 0.95),
        *other_quality_worlds(),
    )


def other_quality_worlds() -> tuple[QualityWorld, ...]:
    """The other quantities that a claim may be about, mostly on documents that methods for retention were chosen on."""
    published = many_tasks("11 tasks as published", [(percent / 100, n) for percent, n in PAPER], 0.04, 0.08)
    tiny = many_tasks("4 tasks of 20 to 60 documents", [(0.8, 20), (0.6, 30), (0.9, 40), (0.5, 60)], 0.1, 0.1)
    uneven = many_tasks("3 tasks of accuracy 0.15 to 0.9", [(0.15, 200), (0.5, 300), (0.9, 400)], 0.1, 0.05)
    clustered = (samples(30, 5, 0.9), samples(164, 20, 0.97), passages(40, 0.05, 0.05), passages(300, 0.05, 0.05))
    alone = (*(one_task(n, 0.8, 0.10, 0.05) for n in (30, 164, 1_319)), one_task(164, 0.98, 0.01, 0.005))
    by_quantity: dict[Quantity, tuple[QualityWorld, ...]] = {
        "mean of ratios": (published, tiny, uneven),
        "score difference": (*alone, *clustered, published, graded(25, 0.95), graded(500, 0.95)),
        "score": (*alone, *clustered, graded(25, 0.95), graded(120, 0.9), graded(500, 0.95)),
    }
    return tuple(replace(one, quantity=quantity) for quantity, worlds in by_quantity.items() for one in worlds)


def fresh_quality_worlds() -> tuple[QualityWorld, ...]:
    """Worlds that no method was chosen or tuned on: other sizes, accuracies, flips and clusters."""
    mixed = [(0.35, 90), (0.97, 700), (0.6, 45), (0.85, 260), (0.75, 1_000)]
    return (
        one_task(73, 0.65, 0.12, 0.07),
        one_task(230, 0.93, 0.03, 0.02),
        one_task(420, 0.6, 0.015, 0.03),
        one_task(750, 0.97, 0.004, 0.012),
        one_task(5_000, 0.7, 0.05, 0.04),
        many_tasks("5 tasks of 45 to 1,000 documents", mixed, 0.05, 0.10),
        samples(90, 3, 0.93),
        languages(120, 8, 400, 0.04, 0.06),
        passages(120, 0.04, 0.06),
        graded(120, 0.9),
    )
