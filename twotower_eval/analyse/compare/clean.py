"""Degenerate outputs (loops, padding, emptiness, junk behind an answer), and figures without them."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.figures import Measured, measured
from twotower_eval.errors import NoEstimate
from twotower_eval.records import Estimate, Generation, GenerationRow, Method, document_prompt_id

MAX_PERIOD = 400  # symbols: a paragraph of which a model writes copies; longer ones compress far too well anyway
MIN_REPEATS = 3.0  # a refrain may come twice
# Rules and separators ("-" * 20), indentation, the zeros of a big number and a matrix of 0s all end real answers.
MIN_TEXT_SPAN, MIN_TOKEN_SPAN = 32, 16
# A short period must come back far more often: "1, 1, 1, 1, 1" is a list, and a test may assert [0] * 10.
MIN_SHORT_REPEATS, SHORT_PERIOD = 8.0, 8

MIN_COMPRESSIBLE_BYTES = 160  # below it zlib's own 8 to 20 bytes and its first window decide the ratio
MAX_COMPRESSION = 0.15  # canonical answers, spaces collapsed, stay above 0.19; ten copies of a line reach 0.1

NGRAM = 4
MIN_NGRAMS = 32  # fewer: a few equal lines of code would make a large share
MAX_REPEATED = 0.85  # share of n-grams seen before; canonical answers reach 0.77, in aligned chains of trigonometry

# What begins the next item of a few-shot prompt: an answer was over before it.
# At the beginning of a line only: docstrings hold such words indented.
NEXT_ITEM = re.compile(r"\n(?:Q|Question|Problem|Exercise|User|Human|Instruction) ?\d* ?:", re.IGNORECASE)

_WORDS = re.compile(r"\w+|[^\w\s]")
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What is wrong with one output, and the figures that say so (``None`` where it is too short to tell).

    ``period`` and ``num_repeats`` are of the tail's loop, in characters of text or, without text, in tokens; of
    ``compression`` (compressed over raw bytes) less is worse, of ``repeated_share`` (of n-grams of words) more.
    """

    empty: bool
    periodic_tail: bool
    compressible: bool
    repeated_ngrams: bool
    junk_after_answer: bool
    period: int | None
    num_repeats: float | None
    compression: float | None
    repeated_share: float | None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the raised flags."""
        return tuple(name for name in FLAG_NAMES if getattr(self, name))

    @cached_property
    def degenerate(self) -> bool:
        """Whether any flag is raised."""
        return bool(self.names)


FLAG_NAMES = ("empty", "periodic_tail", "compressible", "repeated_ngrams", "junk_after_answer")


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The repeating end of a sequence: ``num_repeats`` times ``period`` symbols, from position ``start``."""

    period: int
    num_repeats: float
    start: int


def flags(generation: Generation) -> Flags:
    """Flags of one output, from its useful tokens and text."""
    return _flags(generation.text, generation.token_ids, generation.finish == "length")


@lru_cache(maxsize=100_000)  # greedy decoding gives the same output in every round
def _flags(text: str | None, token_ids: tuple[int, ...], unended: bool) -> Flags:
    words: Sequence[object] = token_ids if text is None else _WORDS.findall(text)
    of_text = None if text is None else periodic_tail(text, MIN_TEXT_SPAN)
    loop = of_text or periodic_tail(token_ids, MIN_TOKEN_SPAN)
    head: Sequence[object] = ""
    if loop is not None:
        head = text[: loop.start] if text is not None and of_text else token_ids[: loop.start]
    compression, repeated_share = compression_ratio(_raw(text, token_ids)), repeated_ngram_share(words)
    return Flags(
        empty=not token_ids or (text is not None and not text.strip()),
        periodic_tail=loop is not None,
        compressible=compression is not None and compression < MAX_COMPRESSION,
        repeated_ngrams=repeated_share is not None and repeated_share > MAX_REPEATED,
        junk_after_answer=_holds_something(head) or (unended and _goes_on(text)),
        period=loop.period if loop else None,
        num_repeats=loop.num_repeats if loop else None,
        compression=compression,
        repeated_share=repeated_share,
    )


def periodic_tail(symbols: Sequence[object], min_span: int) -> Loop | None:
    """The loop that a sequence ends in, by its shortest period; ``None`` without one that is long enough.

    The last repeat may be cut off, as a budget does, and counts by its share.
    """
    for period in range(1, min(MAX_PERIOD, len(symbols) // 2) + 1):
        if symbols[-1] != symbols[-1 - period]:
            continue
        span = period + _matching(symbols, period)
        least = MIN_SHORT_REPEATS if period < SHORT_PERIOD else MIN_REPEATS
        if span >= min_span and span / period >= least:
            return Loop(period=period, num_repeats=span / period, start=len(symbols) - span)
    return None


def _matching(symbols: Sequence[object], period: int) -> int:
    """How many symbols at the end equal the symbol one period before."""
    matching = 0
    for new, old in zip(reversed(symbols), reversed(symbols[:-period]), strict=False):
        if new != old:
            break
        matching += 1
    return matching


def compression_ratio(raw: bytes) -> float | None:
    """Compressed over raw size; ``None`` below the length from which it means something."""
    return len(zlib.compress(raw, 9)) / len(raw) if len(raw) >= MIN_COMPRESSIBLE_BYTES else None


def repeated_ngram_share(words: Sequence[object]) -> float | None:
    """Share of n-grams that came before in the same output; ``None`` where there are too few to tell."""
    ngrams = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if len(ngrams) >= MIN_NGRAMS else None


def _holds_something(head: Sequence[object]) -> bool:
    """Whether there is an answer before a loop."""
    return bool(head.strip() if isinstance(head, str) else head)


def _goes_on(text: str | None) -> bool:
    """Whether an output without an end continues with a new question behind its answer."""
    found = None if text is None else NEXT_ITEM.search(text)
    return found is not None and text is not None and bool(text[: found.start()].strip())


def _raw(text: str | None, token_ids: Sequence[int]) -> bytes:
    """The bytes that are compressed. Spaces are collapsed: deep indentation is not a loop."""
    if text is None:
        return b"".join(token.to_bytes(4, "little") for token in token_ids)
    return _SPACES.sub(" ", text).encode("utf-8", "surrogatepass")


OutputKey = tuple[str, str, int, int]  # run, task, document, sample (of timed answers: the round)
Document = tuple[str, int]  # task, document
Outputs = Mapping[OutputKey, Flags]


@dataclass(frozen=True, kw_only=True)
class Flagged:
    """Share of each arm's outputs that are degenerate, over the outputs that both arms gave.

    ``difference`` is candidate minus baseline, paired; ``by_flag`` counts outputs, (baseline, candidate). An output
    may raise several flags.
    """

    num_outputs: int
    baseline: float | None
    candidate: float | None
    difference: Measured
    by_flag: Mapping[str, tuple[int, int]]


@dataclass(frozen=True, kw_only=True)
class CleanTask:
    """One task's scores over the documents on which neither arm is flagged."""

    name: str
    num_documents: int
    baseline: float
    candidate: float
    retention: Measured


@dataclass(frozen=True, kw_only=True)
class CleanQuality:
    """Retention over documents on which neither arm is flagged: conditional, diagnostic only.

    ``dropped_baseline`` and ``dropped_candidate`` are the shares of documents that each arm's flags drop.
    """

    headline: Measured
    tasks: tuple[CleanTask, ...]
    num_documents: int
    dropped_baseline: float
    dropped_candidate: float


@dataclass(frozen=True, kw_only=True)
class CleanSpeed:
    """Speedups over calls in which no output of either arm is flagged: conditional, diagnostic only.

    ``dropped_baseline`` and ``dropped_candidate`` are the shares of calls that each arm's flags drop, ``None`` where
    the texts are not known.
    """

    time: Measured
    throughput: Measured
    num_calls: int
    dropped_baseline: float | None
    dropped_candidate: float | None


def outputs(run_id: str, rows: Iterable[GenerationRow], cells: Collection[str]) -> dict[OutputKey, Flags]:
    """Flags of every output of these cells; several requests for one document are flagged together."""
    found: dict[OutputKey, Flags] = {}
    for row in rows:
        if row.cell in cells:
            own = flags(row.generation)
            worst = found.setdefault((run_id, row.task, row.doc_id, row.repeat), own)
            if worst is not own and len(own.names) > len(worst.names):
                found[run_id, row.task, row.doc_id, row.repeat] = own
    return found


def flagged_documents(found: Outputs) -> set[Document]:
    """Documents with a degenerate output in any sample, as a score is a mean over samples."""
    return {(task, doc_id) for (_, task, doc_id, _), flag in found.items() if flag.degenerate}


def flagged(baseline: Outputs, candidate: Outputs, clusters: Mapping[Document, str] | None = None) -> Flagged:
    """Shares of degenerate outputs, paired by document and sample; without ``clusters``, each document is its own."""
    keys = sorted(baseline.keys() & candidate.keys())
    pairs = [(baseline[key], candidate[key]) for key in keys]
    names = [(clusters or {}).get((task, doc_id), document_prompt_id(task, doc_id)) for _, task, doc_id, _ in keys]
    by_arm = [np.array([pair[arm].degenerate for pair in pairs], dtype=float) for arm in (0, 1)]
    counted = [Counter(name for pair in pairs for name in pair[arm].names) for arm in (0, 1)]
    return Flagged(
        num_outputs=len(keys),
        baseline=float(by_arm[0].mean()) if keys else None,
        candidate=float(by_arm[1].mean()) if keys else None,
        difference=measured(lambda: paired_difference(by_arm[0].tolist(), by_arm[1].tolist(), names)),
        by_flag={name: (counted[0][name], counted[1][name]) for name in FLAG_NAMES},
    )


def paired_difference(baseline: list[float], candidate: list[float], clusters: list[str]) -> Estimate:
    """Mean of the second values minus that of the first, of the same outputs; NoEstimate without outputs.

    Where fewer than 5 clusters differ, each side is bounded by the binomial tail of the clusters that moved that way,
    each counted with the weight of the largest: on the safe side, exact where clusters are equal.
    """
    if not clusters:
        raise NoEstimate("no output of both arms was kept, so that none can be looked at")
    same = ["outputs"] * len(clusters)
    table = stats.PairedScores(tasks=same, groups=same, clusters=clusters, baseline=baseline, candidate=candidate).table
    if stats.num_discordant(table)[0] >= stats.FEW:  # else an exact bound, as for retention
        return stats.difference(table, stats.draw_task_means(table))
    delta_C, size_C = (table.candidate_CL - table.baseline_CL)[:, 0], table.count_CL[:, 0]
    n, largest = len(size_C), float(size_C.max() * len(size_C) / size_C.sum())
    less, more = int((delta_C < 0).sum()), int((delta_C > 0).sum())
    low, high = (min(1.0, largest * stats.binomial_upper_bound(k, n, (1 - stats.LEVEL) / 2)) for k in (less, more))
    return Estimate(
        value=float(delta_C.sum() / size_C.sum()),
        low=-low,
        high=high,
        level=stats.LEVEL,
        n=n,
        method=Method(kind="exact_bound", num_differing=less + more),
    )


def clean_quality(
    scores: stats.PairedScores, documents: list[Document], dropped: tuple[set[Document], ...]
) -> CleanQuality:
    """Headline and tasks without the documents that either arm's flags drop; ``documents`` names each score's own."""
    kept = [i for i, document in enumerate(documents) if not any(document in drop for drop in dropped)]
    shares = [sum(document in drop for document in documents) / max(1, len(documents)) for drop in dropped]
    tasks: tuple[CleanTask, ...] = ()
    headline = Measured(estimate=None, reason="no document on which neither arm is flagged")
    if kept:
        table = subset(scores, kept).table
        draws = stats.draw_task_means(table)
        headline = measured(lambda: stats.retention(table, draws))
        tasks = tuple(_clean_task(table, draws, name) for name in table.tasks)
        missing = sorted(set(scores.groups) - set(table.tasks))
        if missing:
            headline = Measured(estimate=None, reason=f"nothing clean is left of {', '.join(missing)}")
    return CleanQuality(
        headline=headline,
        tasks=tasks,
        num_documents=len(kept),
        dropped_baseline=shares[0],
        dropped_candidate=shares[1],
    )


def _clean_task(table: stats.ScoreTable, draws: stats.Draws, name: str) -> CleanTask:
    k, weights_K = table.tasks.index(name), table.weights_K([name])
    here_L = table.task_of_leaf_L == k
    return CleanTask(
        name=name,
        num_documents=int(table.count_CL[:, here_L].sum()),
        baseline=float(table.task_means_K(table.baseline_CL)[k]),
        candidate=float(table.task_means_K(table.candidate_CL)[k]),
        retention=measured(lambda: stats.retention(table, draws, weights_K)),
    )


def subset(scores: stats.PairedScores, kept: list[int]) -> stats.PairedScores:
    """The scores at these positions."""
    return stats.PairedScores(
        tasks=[scores.tasks[i] for i in kept],
        groups=[scores.groups[i] for i in kept],
        clusters=[scores.clusters[i] for i in kept],
        baseline=[scores.baseline[i] for i in kept],
        candidate=[scores.candidate[i] for i in kept],
        chance=[scores.chance[i] for i in kept] if scores.chance else (),
        by_size=scores.by_size,
    )


def clean_speed(timed: stats.TimedCalls, dropped: tuple[list[bool], list[bool]] | None) -> CleanSpeed:
    """Speedups without the flagged calls, given as one truth value per call and arm.

    ``dropped`` is ``None`` where the outputs were not kept.
    """
    if dropped is None:
        none = Measured(estimate=None, reason="the outputs of this workload are not kept")
        return CleanSpeed(time=none, throughput=none, num_calls=0, dropped_baseline=None, dropped_candidate=None)
    kept_P = ~(np.array(dropped[0]) | np.array(dropped[1]))
    shares = [float(np.mean(drop)) for drop in dropped]
    time = throughput = Measured(estimate=None, reason="no call without a flagged output")
    if kept_P.any():
        part = replace(
            timed,
            baseline_s=timed.baseline_s[:, kept_P],
            candidate_s=timed.candidate_s[:, kept_P],
            baseline_tokens=timed.baseline_tokens[:, kept_P],
            candidate_tokens=timed.candidate_tokens[:, kept_P],
        )
        time = measured(lambda: stats.speedup(part))
        throughput = measured(lambda: stats.speedup(part, "throughput"))
    return CleanSpeed(
        time=time,
        throughput=throughput,
        num_calls=int(kept_P.sum()),
        dropped_baseline=shares[0],
        dropped_candidate=shares[1],
    )
