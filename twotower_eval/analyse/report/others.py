"""Scores beside retention: other metrics and filters, and those of all documents together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.points import Measured, OtherScore, QualityPoint
from twotower_eval.analyse.compare.wholes import WholeScore
from twotower_eval.analyse.report.text import (
    NONE,
    bullets,
    count,
    escape,
    retention,
    scored_by_words,
    significant,
    table,
)
from twotower_eval.analyse.words.methods import method_text


def other_scores(point: QualityPoint) -> str:
    """The table, and under it how scores of all documents together come about."""
    header = ["task", "scored by", "metric (filter)", "better", "n", "baseline", "candidate", "difference [95 %]"]
    found: list[OtherScore | WholeScore] = [*point.others, *point.wholes]
    rows = []
    for other in sorted(found, key=lambda other: (other.task, other.metric, other.filter)):
        filtered = f" ({escape(other.filter)})" if other.filter != "none" else ""
        rows.append(
            [
                escape(other.task),
                scored_by_words(other.scored_by),
                escape(other.metric) + filtered,
                "higher" if other.higher_is_better else "lower",
                count(other.num_documents),
                *_figures(other),
            ]
        )
    remarks = bullets(_whole_remarks(point.wholes))
    return table(header, rows, left=4) + (f"\n{remarks}" if remarks else "")


def _figures(other: OtherScore | WholeScore) -> list[str]:
    """Baseline, candidate and what lies between them."""
    if isinstance(other, OtherScore):
        arms = [significant(other.baseline, 4), significant(other.candidate, 4)]
        return [*arms, _change(Measured(estimate=other.difference))]
    return [
        whole_figure(other.baseline, other.baseline_interval),
        whole_figure(other.candidate, other.candidate_interval),
        _change(other.difference),
    ]


def whole_figure(value: stats.Figure, interval: Measured) -> str:
    """A score of all documents together with its interval, where it has them."""
    if value.value is None:
        return NONE
    found = interval.estimate
    ends = "" if found is None else f" [{significant(found.low, 4)}, {significant(found.high, 4)}]"
    return significant(value.value, 4) + ends


def _change(change: Measured) -> str:
    found = change.estimate
    if found is None:
        return NONE
    if found.method_kind == "equal_by_construction":
        return "0 by construction"
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def _whole_remarks(wholes: Sequence[WholeScore]) -> Iterator[str]:
    """Which function made each score, what is kept of it, and why figures are missing."""
    for whole in wholes:
        named = f"{escape(whole.task)}, {escape(whole.metric)}"
        named += f" ({escape(whole.filter)})" if whole.filter != "none" else ""
        kept = f"; retention {retention(whole.retention)}" if whole.retention.estimate else ""
        yield f"{named}: of all documents together, by lm-eval's {escape(whole.aggregation)}{kept}."
        found = {"baseline": whole.baseline.reason, "candidate": whole.candidate.reason}
        if not any(found.values()):
            found = {
                "interval of the baseline": whole.baseline_interval.reason,
                "interval of the candidate": whole.candidate_interval.reason,
                "difference": whole.difference.reason,
                "retention": whole.retention.reason if whole.higher_is_better else None,
            }
        reasons: dict[str, list[str]] = {}
        for what, why in found.items():
            if why is not None:
                reasons.setdefault(why, []).append(what)
        yield from (f"{named}: no {', '.join(what)}: {escape(why)}." for why, what in reasons.items())
    intervals = [found.estimate for whole in wholes for found in (whole.baseline_interval, whole.candidate_interval)]
    methods = sorted({method_text(found) for found in intervals if found})
    if methods:
        yield f"Intervals of scores of all documents together: {escape('; '.join(methods))}."
