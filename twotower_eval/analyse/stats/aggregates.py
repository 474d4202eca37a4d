"""Scores that lm-eval computes from all documents together (perplexities, F1 over the set, BLEU and the like), as
functions of sums over documents, with their intervals.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
from scipy.special import logsumexp

from twotower_eval.analyse.stats.chance import t_interval_of_mean
from twotower_eval.analyse.stats.intervals import (
    FEW,
    LEVEL,
    NUM_RESAMPLES,
    Floats,
    corrected_percentiles,
    dof_of_mean,
    t_quantile,
    third_cumulant,
)
from twotower_eval.analyse.stats.paired import resampled_sums
from twotower_eval.errors import NoEstimate
from twotower_eval.records import Estimate, Method

Function = Callable[[Floats], Floats]  # sums over documents (Q, V) -> scores (Q); NaN where there is none

LOG_0 = -9999999999  # what sacrebleu takes for the logarithm of 0
BETA = 2  # of chrF: recall counts twice


def _ratio(sums_QV: Floats) -> Floats:
    ratios_Q: Floats = np.divide(
        sums_QV[:, 0], sums_QV[:, 1], out=np.full(len(sums_QV), np.nan), where=sums_QV[:, 1] != 0
    )
    return ratios_Q


def _f1(counts_QKK: Floats, labels_K: Floats) -> Floats:
    """Of label 1, 0 where neither arm of the comparison ever has it, as scikit-learn gives it."""
    one = labels_K == 1
    hits_Q = counts_QKK[:, one][:, :, one].sum(axis=(1, 2))
    seen_Q = counts_QKK[:, one].sum(axis=(1, 2)) + counts_QKK[:, :, one].sum(axis=(1, 2))
    scores_Q: Floats = np.divide(2 * hits_Q, seen_Q, out=np.zeros(len(seen_Q)), where=seen_Q > 0)
    return scores_Q


def _matthews(counts_QKK: Floats, labels_K: Floats) -> Floats:
    """Correlation of labels (Gorodkin 2004), 0 where one side has a single label, as scikit-learn gives it."""
    gold_QK, given_QK = counts_QKK.sum(axis=2), counts_QKK.sum(axis=1)
    num_Q, right_Q = gold_QK.sum(axis=1), np.trace(counts_QKK, axis1=1, axis2=2)
    shared_Q = right_Q * num_Q - (gold_QK * given_QK).sum(axis=1)
    spread_Q = (num_Q**2 - (gold_QK**2).sum(axis=1)) * (num_Q**2 - (given_QK**2).sum(axis=1))
    scores_Q: Floats = np.divide(
        shared_Q, np.sqrt(np.maximum(spread_Q, 0)), out=np.zeros(len(num_Q)), where=spread_Q > 0
    )
    return scores_Q


def _bleu(sums_QV: Floats) -> Floats:
    """Sums of sacrebleu's statistics: lengths of answers and references, right and all n-grams of 1 to 4 words."""
    answer_Q, reference_Q = sums_QV[:, 0], sums_QV[:, 1]
    smoothing_Q, going_Q, logs_Q = np.ones(len(sums_QV)), np.ones(len(sums_QV), dtype=bool), np.zeros(len(sums_QV))
    for right_Q, all_Q in zip(sums_QV[:, 2:6].T, sums_QV[:, 6:10].T, strict=True):
        going_Q &= all_Q > 0
        smoothing_Q = np.where(going_Q & (right_Q == 0), 2 * smoothing_Q, smoothing_Q)
        found_Q = np.where(right_Q == 0, 1 / smoothing_Q, right_Q) / np.maximum(all_Q, 1)
        logs_Q += np.where(going_Q, np.log(100 * found_Q), LOG_0)
    short_Q = answer_Q < reference_Q
    excess_Q = reference_Q / np.maximum(answer_Q, 1) - 1
    brevity_Q = np.where(short_Q, np.where(answer_Q > 0, np.exp(-excess_Q), 0.0), 1.0)
    scores_Q: Floats = np.where(sums_QV[:, 2:6].any(axis=1), brevity_Q * np.exp(logs_Q / 4), 0.0)
    return scores_Q


def _chrf(sums_QV: Floats) -> Floats:
    """Sums of sacrebleu's statistics: n-grams of answer and reference and how many they share, for each order."""
    answer_QN, reference_QN, shared_QN = sums_QV[:, ::3], sums_QV[:, 1::3], sums_QV[:, 2::3]
    both_QN = (answer_QN > 0) & (reference_QN > 0)
    orders_Q = np.maximum(both_QN.sum(axis=1), 1)
    precision_Q, recall_Q = (
        np.where(both_QN, shared_QN / np.maximum(all_QN, 1), 0.0).sum(axis=1) / orders_Q
        for all_QN in (answer_QN, reference_QN)
    )
    below_Q = BETA**2 * precision_Q + recall_Q
    scores_Q: Floats = np.divide(
        100 * (1 + BETA**2) * precision_Q * recall_Q, below_Q, out=np.zeros(len(sums_QV)), where=below_Q > 0
    )
    return scores_Q


def _ter(sums_QV: Floats) -> Floats:
    """Sums of edits and of words in the references; all is wrong where only answers have words."""
    without = np.where(sums_QV[:, 0] > 0, 1.0, 0.0)
    ratios_Q: Floats = np.divide(sums_QV[:, 0], sums_QV[:, 1], out=without, where=sums_QV[:, 1] > 0)
    return 100 * ratios_Q


FUNCTIONS: Mapping[str, Function] = {
    "nanmean": _ratio,  # (value, 1), or (0, 0) for a document without one
    "bits_per_byte": lambda sums_QV: -_ratio(sums_QV) / np.log(2),  # (log-likelihood in nats, bytes)
    "bleu": _bleu,
    "chrf": _chrf,
    "chrf++": _chrf,
    "ter": _ter,  # (edits, words of the reference)
}
LOG_FUNCTIONS: Mapping[str, Function] = {  # the logarithm of the score
    "perplexity": lambda sums_QV: -_ratio(sums_QV),  # (log-likelihood in nats, 1)
    "weighted_perplexity": lambda sums_QV: -_ratio(sums_QV),  # (log-likelihood in nats, words or bytes)
}
LABEL_FUNCTIONS: Mapping[str, Callable[[Floats, Floats], Floats]] = {  # (right label, given label)
    "f1": _f1,
    "matthews_corrcoef": _matthews,
}


ANYTHING = (-inf, inf)
# Where a function's values lie, whatever the documents, log-likelihoods being at most 0; means: see _within.
RANGES: Mapping[str, tuple[float, float]] = {
    "perplexity": (1.0, inf),
    "weighted_perplexity": (1.0, inf),
    "bits_per_byte": (0.0, inf),
    "bleu": (0.0, 100.0),
    "chrf": (0.0, 100.0),
    "chrf++": (0.0, 100.0),
    "ter": (0.0, inf),
    "f1": (0.0, 1.0),
    "matthews_corrcoef": (-1.0, 1.0),
}


Parts = Sequence[Sequence[float]]  # one entry a document


@dataclass(frozen=True, kw_only=True, eq=False)
class WholeScores:
    """One score of all documents together for each arm, and its values in resamples that both arms share.

    ``left_AC`` are the scores without each cluster in turn, ``None`` where only draws are known. With ``log`` all of
    it is logarithms. No interval leaves ``within``, the range of the function's values, on their own scale, nor, where
    that is unknown (``None``), the values of the draws. Every estimate raises NoEstimate where there is none.
    """

    score_A: Floats
    draws_AQ: Floats
    left_AC: Floats | None
    num_clusters: int
    num_discordant: int | None
    log: bool
    method: Method
    seed: int
    within: tuple[float, float] | None

    def value(self, arm: int = 0) -> float:
        """An arm's score, without an interval."""
        with np.errstate(over="ignore"):
            value = float(np.exp(self.score_A[arm]) if self.log else self.score_A[arm])
        if not np.isfinite(value):
            raise NoEstimate("the score of all documents together is too large a number" if self.log else _NO_VALUE)
        return value

    def alone(self, arm: int) -> WholeScores:
        """The same of one arm."""
        one = slice(arm, arm + 1)
        left_AC = None if self.left_AC is None else self.left_AC[one]
        return dataclasses.replace(self, score_A=self.score_A[one], draws_AQ=self.draws_AQ[one], left_AC=left_AC)

    def score(self, arm: int = 0, *, level: float = LEVEL) -> Estimate:
        """An arm's score; a perplexity's interval is made on the scale of logarithms."""
        value = self.value(arm)
        left_C = None if self.left_AC is None else self.left_AC[arm]
        low, high = self._interval(float(self.score_A[arm]), self.draws_AQ[arm], left_C, level)
        if self.log:
            with np.errstate(over="ignore"):
                low, high = float(np.exp(low)), float(np.exp(high))
        return self._estimate(value, low, high, level, self.within)

    def difference(self, *, level: float = LEVEL) -> Estimate:
        """Candidate's score minus the baseline's; not for fewer than 5 clusters that differ."""
        if self.num_discordant is not None and self.num_discordant < FEW:
            raise NoEstimate(f"{self.num_discordant} of {self.num_clusters} clusters differ: too few for an interval")
        value = self.value(1) - self.value(0)
        draws_AQ, left_AC = self.plain(self.draws_AQ), None if self.left_AC is None else self.plain(self.left_AC)
        left_C = None if left_AC is None else left_AC[1] - left_AC[0]
        low, high = self._interval(value, draws_AQ[1] - draws_AQ[0], left_C, level)
        farthest = self.within[1] - self.within[0] if self.within else inf
        return self._estimate(value, low, high, level, (-farthest, farthest))

    def retention(self, *, level: float = LEVEL) -> Estimate:
        """Candidate's score over the baseline's, for scores of which more is better."""
        if self.log or self.score_A[0] <= 0:
            raise NoEstimate("the baseline's score is not above 0: retention is undefined")
        if self.num_discordant is not None and self.num_discordant < FEW:
            raise NoEstimate(f"{self.num_discordant} of {self.num_clusters} clusters differ: too few for an interval")
        if (self.draws_AQ[0] <= 0).any():
            raise NoEstimate("the baseline's score is not above 0 in every resample: the ratio has no finite interval")
        value = float(self.score_A[1] / self.score_A[0])
        left_C = (
            None if self.left_AC is None else self.left_AC[1] / np.where(self.left_AC[0] > 0, self.left_AC[0], np.nan)
        )
        low, high = self._interval(value, self.draws_AQ[1] / self.draws_AQ[0], left_C, level)
        return self._estimate(value, low, high, level, (0.0, inf) if self.within and self.within[0] >= 0 else None)

    def plain(self, scores: Floats) -> Floats:
        """Scores or draws on their own scale."""
        with np.errstate(over="ignore"):
            plain: Floats = np.exp(scores) if self.log else scores
        return plain

    def _estimate(
        self, value: float, low: float, high: float, level: float, within: tuple[float, float] | None
    ) -> Estimate:
        least, most = within or ANYTHING
        low, high = min(value, max(low, least)), max(value, min(high, most))
        if not np.isfinite([low, high]).all():
            raise NoEstimate("the score is too large a number in some resamples: there is no finite interval")
        return Estimate(
            value=value, low=low, high=high, level=level, n=self.num_clusters, method=self.method, seed=self.seed
        )

    def _interval(self, value: float, draws_Q: Floats, left_C: Floats | None, level: float) -> tuple[float, float]:
        """The wider, end by end, of the bootstrap's corrected percentiles and Student's interval.

        Of a function of unknown range the percentiles alone: each of them is a value that it can give.
        """
        n = self.num_clusters
        if n < 2:
            raise NoEstimate("one cluster only: its variation is unknown, so there is no interval")
        undefined = int((~np.isfinite(draws_Q)).sum())
        if undefined:
            raise NoEstimate(f"the score has no value in {undefined:,} of {len(draws_Q):,} resamples")
        inflation, dof, skew = sqrt(n / (n - 1)), n - 1.0, 0.0
        half = t_quantile(level, dof) * inflation * float(draws_Q.std())
        low, high = value - half, value + half
        if left_C is not None and np.isfinite(left_C).all():
            # Jackknife: what each cluster adds to the score, as if it were a mean of them.
            parts_C = (n - 1) * (left_C.mean() - left_C)
            variance = float(parts_C.var(ddof=1)) / n
            dof, skew = dof_of_mean(parts_C), third_cumulant(parts_C) / variance**1.5 if variance > 0 else 0.0
            low, high = t_interval_of_mean(value, parts_C, level)
        if low == high:
            raise NoEstimate("no cluster changes the score: there is no interval")
        drawn = corrected_percentiles(draws_Q, draws_Q, value, level=level, dof=dof, inflation=inflation, skew=skew)
        return drawn if self.within is None else (min(low, drawn[0]), max(high, drawn[1]))


_NO_VALUE = "these documents together have no such score"


def summed(name: str, arms: Sequence[Parts], clusters: Sequence[str], *, seed: int = 0) -> WholeScores:
    """A score of ``SUMMED_AGGREGATIONS`` for one or two arms on the same documents; ``clusters`` names each one's."""
    sizes = {len(parts) for parts in arms} | {len(clusters)}
    widths = {len(part) for parts in arms for part in parts}
    if len(sizes) != 1 or 0 in sizes or len(widths) != 1:
        raise ValueError(f"{name}: it needs documents, the same in both arms, and as many parts of each")
    parts_ANV = np.array([list(map(tuple, parts)) for parts in arms], dtype=float)
    columns_ANV, function = _columns(name, parts_ANV)
    num_arms, _, num_columns = columns_ANV.shape
    _, code_N = np.unique(np.asarray(clusters, dtype=str), return_inverse=True)
    n = int(code_N.max()) + 1
    sums_CAV = np.zeros((n, num_arms, num_columns))
    np.add.at(sums_CAV, code_N, columns_ANV.transpose(1, 0, 2))
    total_AV = sums_CAV.sum(axis=0)
    rng = np.random.default_rng(seed)
    drawn_QAV = resampled_sums(rng, sums_CAV.reshape(n, -1), NUM_RESAMPLES).reshape(-1, num_arms, num_columns)
    left_CAV = total_AV - sums_CAV
    return WholeScores(
        score_A=function(total_AV),
        draws_AQ=np.stack([function(drawn_QAV[:, arm]) for arm in range(num_arms)]),
        left_AC=np.stack([function(left_CAV[:, arm]) for arm in range(num_arms)]),
        num_clusters=n,
        num_discordant=int((sums_CAV[:, 0] != sums_CAV[:, -1]).any(axis=1).sum()),
        log=name in LOG_FUNCTIONS,
        method=Method(kind="function_bootstrap", function=name, num_resamples=NUM_RESAMPLES, jackknife=True),
        seed=seed,
        within=_within(name, parts_ANV),
    )


def replicated(
    name: str, values: Sequence[float], replicates: Sequence[Sequence[float]], num_clusters: int, *, seed: int
) -> WholeScores:
    """A score whose function was called elsewhere, on all documents and on resampled clusters, the same in each arm.

    An arm may have been resampled more often than the other: of each the first draws are taken, which both have.
    """
    num = min(len(drawn) for drawn in replicates)
    if num == 0:
        raise ValueError(f"{name}: an arm has no resamples")
    draws_AQ = np.array([drawn[:num] for drawn in replicates], dtype=float)
    same = len(values) > 1 and values[0] == values[1] and bool((draws_AQ[0] == draws_AQ[1]).all())
    return WholeScores(
        score_A=np.array(values, dtype=float),
        draws_AQ=draws_AQ,
        left_AC=None,
        num_clusters=num_clusters,
        num_discordant=0 if same else None,
        log=False,
        method=Method(kind="function_bootstrap", function=name, num_resamples=num),
        seed=seed,
        within=None,
    )


def averaged(members: Sequence[WholeScores], weights: Sequence[float]) -> WholeScores:
    """Weighted mean of several tasks' scores. Each task's clusters are drawn apart from the others'.

    The mean of perplexities is kept as its logarithm, as they are: its interval is made on that scale too.
    """
    share_M = np.asarray(weights, dtype=float) / sum(weights)
    num = min(one.draws_AQ.shape[1] for one in members)
    # Tasks of one size were drawn alike: another order for each makes them independent, the same in both arms.
    orders = [np.random.default_rng(number).permutation(num) for number in range(len(members))]
    log = all(one.log for one in members)

    def mean(values: Sequence[Floats]) -> Floats:
        if log:
            weighted = [scores + share for scores, share in zip(values, np.log(share_M), strict=True)]
            return np.asarray(logsumexp(np.stack(weighted), axis=0))
        plain = np.stack([one.plain(scores) for one, scores in zip(members, values, strict=True)])
        return np.asarray(np.tensordot(share_M, plain, axes=1))

    discordant = [one.num_discordant for one in members]
    ranges = [one.within for one in members if one.within is not None]
    return WholeScores(
        score_A=mean([one.score_A for one in members]),
        draws_AQ=mean([one.draws_AQ[:, :num][:, order] for one, order in zip(members, orders, strict=True)]),
        left_AC=None,
        num_clusters=sum(one.num_clusters for one in members),
        num_discordant=None if None in discordant else sum(one or 0 for one in discordant),
        log=log,
        method=dataclasses.replace(members[0].method, num_tasks=len(members)),
        seed=members[0].seed,
        within=(min(low for low, _ in ranges), max(high for _, high in ranges))
        if len(ranges) == len(members)
        else None,
    )


def _within(name: str, parts_ANV: Floats) -> tuple[float, float]:
    """Where a score's values lie. Means stay on their side of 0, and between 0 and 1, if all documents' values do."""
    low, high = float(parts_ANV[..., 0].min()), float(parts_ANV[..., 0].max())
    if name in LOG_FUNCTIONS and high > 0:  # no likelihoods of text
        return 0.0, inf
    if name in RANGES:
        return RANGES[name]
    return (0.0 if low >= 0 else -inf), (1.0 if low >= 0 and high <= 1 else 0.0 if high <= 0 else inf)


def _columns(name: str, parts_ANV: Floats) -> tuple[Floats, Function]:
    """What is summed over documents, and the function of the sums."""
    if name not in LABEL_FUNCTIONS:
        return parts_ANV, {**FUNCTIONS, **LOG_FUNCTIONS}[name]
    labels_K, code_AN2 = np.unique(parts_ANV, return_inverse=True)
    num = len(labels_K)
    code_AN2 = code_AN2.reshape(parts_ANV.shape)
    of_counts = LABEL_FUNCTIONS[name]
    columns_ANV = np.eye(num * num)[code_AN2[..., 0] * num + code_AN2[..., 1]]
    return columns_ANV, lambda sums_QV: of_counts(sums_QV.reshape(-1, num, num), labels_K)
