"""Metrics that lm-eval computes from all documents of a task together: what is kept of each document, or of all.

lm-eval's ``process_results`` gives an item for each document and metric, and the task names the function that makes
one number of the items. Where that is a function of sums (``SUMMED_AGGREGATIONS``), a document's part in them is kept
and reports do the rest. Any other function is called here: on all items, and on those of resampled clusters.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Sequence
from functools import cache, partial
from typing import Any, Protocol, SupportsFloat, cast

import numpy as np

from twotower_eval.measure.suites import LACKING, MISTAKEN, aggregation, aggregation_name, is_lacking
from twotower_eval.measure.suites.lm_tasks import sacrebleu_pair
from twotower_eval.measure.suites.lm_types import Aggregation, Task
from twotower_eval.progress import Advance, Progress
from twotower_eval.records import LABEL_AGGREGATIONS, sha256_text

# Of functions that take all documents anew each time: at least and at most so many, in between as time allows.
LEAST_REPLICATES, NUM_REPLICATES = 100, 1_000
BUDGET_S = 60.0  # of one metric in one cell
SLOW_S = 5.0  # what takes longer shows how far it is
SEED = 0
FAILURES = (*MISTAKEN, *LACKING)  # lm-eval would fail as well

Items = Sequence[object]  # one of each document
Parts = tuple[float, ...]


def mean_item(source: Task, metric: str, item: object) -> object:
    """A document's value under a metric that is a mean; the Brier score's own function makes it of one item."""
    from lm_eval.api.metrics import brier_score

    return brier_score([item]) if aggregation(source, metric) is brier_score else item


def parts_of(name: str, item: object) -> Parts | str:
    """A document's part in the sums that an aggregation is a function of, or the reason why it has none.

    It depends on nothing but the document's item. References of a text are taken as many as there are.
    """
    try:
        parts = _parts(name, item)
    except FAILURES as error:
        return f"lm-eval's item of this document is not one of {name} ({type(error).__name__})"
    if not all(map(math.isfinite, parts)):
        return f"lm-eval's item of this document is {item!r}"
    return parts


def value_of(source: Task, metric: str, items: Items) -> float | str:
    """What lm-eval's own function makes of all documents, or the reason why there is no such number."""
    value = _called(aggregation(source, metric), items)
    return f"lm-eval's {aggregation_name(source, metric)} of all documents {value}" if isinstance(value, str) else value


def replicates_of(
    source: Task, metric: str, items: Items, clusters: Sequence[str], progress: Progress | None = None
) -> tuple[float, ...] | str:
    """The function's values on the documents of resampled clusters, or the reason why there are none.

    Draws depend on the clusters' names and on ``SEED`` alone: both arms draw the same, in the same order. A slow
    function is called as often as ``BUDGET_S`` allows, but ``LEAST_REPLICATES`` times.
    """
    members: dict[str, list[object]] = {cluster: [] for cluster in sorted(set(clusters))}
    for cluster, item in zip(clusters, items, strict=True):
        members[cluster].append(item)
    by_cluster = list(members.values())
    rng = np.random.default_rng(SEED)
    name, function = aggregation_name(source, metric), aggregation(source, metric)
    values: list[float] = []
    started_s = time.monotonic()
    with contextlib.ExitStack() as shown:
        advance: Advance = lambda num=1, /: None  # noqa: E731
        while len(values) < NUM_REPLICATES:
            spent_s = time.monotonic() - started_s
            if len(values) >= LEAST_REPLICATES and spent_s >= BUDGET_S:
                break
            if len(values) == 1 and progress is not None and spent_s * NUM_REPLICATES > SLOW_S:
                advance = shown.enter_context(progress.track(NUM_REPLICATES, f"resampling {metric}, by {name}"))
                advance()
            drawn = rng.integers(0, len(by_cluster), size=len(by_cluster))
            found = _called(function, [item for number in drawn for item in by_cluster[number]])
            if isinstance(found, str):
                return f"lm-eval's {name} of resampled documents {found}"
            values.append(found)
            advance()
    return tuple(values)


def _called(function: Aggregation, items: Items) -> float | str:
    """A function's value, or what is wrong with it; what it lacks is no property of the answers, and is raised."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scikit-learn's, of labels that do not occur
            value = float(function(items))
    except FAILURES as error:
        if is_lacking(error):
            raise
        return f"fails ({type(error).__name__}: {error})".replace("\n", " ")
    return value if math.isfinite(value) else f"is {value}"


def _parts(name: str, item: object) -> Parts:
    if name in ("bleu", "chrf", "chrf++", "ter"):
        return _text_parts(name, item)
    if name == "nanmean":
        value = _as_float(item)
        return (0.0, 0.0) if math.isnan(value) else (value, 1.0)
    first, second = (item, 1) if name == "perplexity" else cast(tuple[object, object], item)
    number = _label if name in LABEL_AGGREGATIONS else _as_float
    return number(first), number(second)


def _as_float(value: object) -> float:
    """Raises where it is no number."""
    return float(cast(SupportsFloat, value))


def _label(label: object) -> float:
    """A number for a label; functions of labels only ask whether two are the same, and which is 1."""
    return float(int(sha256_text(label)[:12], 16)) if isinstance(label, str) else _as_float(label)


def _text_parts(name: str, item: object) -> Parts:
    """sacrebleu's own statistics of a document, in the settings that lm-eval's functions take."""
    references, answers = sacrebleu_pair(*cast(Sequence[object], item)[:2])
    [found] = _sacrebleu(name)._extract_corpus_statistics(answers, references)
    return tuple(float(number) for number in found)


class _SacreBleu(Protocol):
    """What we use of sacrebleu's metrics."""

    def _extract_corpus_statistics(self, answers: list[str], references: list[object]) -> list[list[float]]: ...


@cache
def _sacrebleu(name: str) -> _SacreBleu:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sacrebleu.metrics.ter import TER

    kinds: dict[str, Any] = {
        "bleu": BLEU,
        "chrf": CHRF,
        "chrf++": partial(CHRF, word_order=2),
        "ter": TER,
    }
    metric: _SacreBleu = kinds[name]()
    return metric
