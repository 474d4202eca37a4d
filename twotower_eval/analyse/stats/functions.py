"""lm-eval's functions of all documents as functions of sums over documents, and the range of each.

Shape letters as in ``aggregates``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import inf

import numpy as np

from twotower_eval.analyse.stats.intervals import Floats

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
