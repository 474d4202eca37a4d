"""The calibration as Markdown for people and CSV for programs: rates with their Monte-Carlo intervals, and misses."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from twotower_eval.analyse import stats
from twotower_eval.analyse.calibration.look_worlds import MOST_LOOKS, LookTally
from twotower_eval.analyse.calibration.simulate import PAIRS, NullTally, Tally

COVERAGE = (0.93, 0.97)
WRONG = 0.05
MC_LEVEL = 0.95  # of the Monte-Carlo intervals printed
MOSTLY = 0.1  # share of exact bounds from which on they explain a coverage above what is asked
Missed = Literal["coverage", "wrong verdicts"]
ENOUGH = 500  # repetitions, to call a table without misses good
MISS_ALPHA = 0.05  # over all rows of the table together


@dataclass(frozen=True, kw_only=True)
class Rate:
    """A share of repetitions with its Clopper-Pearson interval; ``value`` is ``None`` where there were none."""

    events: int
    n: int

    @property
    def value(self) -> float | None:
        """The share seen."""
        return self.events / self.n if self.n else None

    def bounds(self, alpha: float = (1 - MC_LEVEL) / 2) -> tuple[float, float]:
        """Lower and upper bound, each one-sided at ``alpha``."""
        if not self.n:
            return 0.0, 1.0
        low = 1 - stats.binomial_upper_bound(self.n - self.events, self.n, alpha)
        return low, stats.binomial_upper_bound(self.events, self.n, alpha)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One world's rates, and what it misses of the requirements, beyond Monte-Carlo error."""

    tally: Tally
    coverage: Rate
    supported: Rate
    refuted: Rate
    undecided: Rate
    missed: Missed | None


def rows(tallies: Sequence[Tally]) -> tuple[Row, ...]:
    """Judge every world; a miss must be beyond chance over the three rates of all worlds together (Bonferroni)."""
    return tuple(_row(tally, _alpha(len(tallies))) for tally in tallies)


def _alpha(num_worlds: int) -> float:
    return MISS_ALPHA / max(3 * num_worlds, 1)


def _row(tally: Tally, alpha: float) -> Row:
    supported, refuted = (Rate(events=k, n=tally.num) for k in (tally.num_supported, tally.num_refuted))
    undecided = Rate(events=tally.num - tally.num_supported - tally.num_refuted, n=tally.num)
    coverage = Rate(events=tally.num_covered, n=tally.num_found)
    _, high = coverage.bounds(alpha)
    missed: Missed | None = None
    if high < COVERAGE[0]:
        missed = "coverage"
    elif max(supported.bounds(alpha)[0], refuted.bounds(alpha)[0]) > WRONG:
        missed = "wrong verdicts"
    return Row(tally=tally, coverage=coverage, supported=supported, refuted=refuted, undecided=undecided, missed=missed)


def remark(row: Row) -> str:
    """Which requirement is missed, and why a coverage is higher than needed; else empty."""
    tally, remarks = row.tally, []
    if row.missed is not None:
        remarks.append(f"MISSED: {row.missed}")
    elif _over(row):
        share = 100 * tally.num_exact / tally.num_found
        remarks.append(f"exact bound in {share:.0f} %" if _is_exact(row) else "covers above 97 %")
    if tally.num_found < tally.num:
        remarks.append(f"no interval in {100 * (1 - tally.num_found / tally.num):.1f} %, so no verdict")
    return "; ".join(remarks)


def as_markdown(
    parts: tuple[Sequence[Row], Sequence[Row]],
    nulls: Sequence[NullTally],
    looks: Sequence[LookTally] = (),
    *,
    num_resamples: int,
    seed: int,
    version: str,
) -> str:
    """The whole report; ``parts`` are the worlds that methods were chosen on, and fresh ones."""
    found = [*parts[0], *parts[1]]
    num = max((row.tally.num for row in found), default=0)
    head = f"""# Calibration of intervals and verdicts

**{_verdict(found, num)}** {_extremes(found)}

{num:,} repetitions per world, {num_resamples:,} resamples per interval, seed {seed}, version {version}. Every
repetition goes through the functions that reports and claims use: `stats.retention`, `mean_of_ratios`, `difference`,
`mean_score`, `speedup` and `decide`. The claim judged is that the quantity is at least its true value, with no
margin. *Wrong SUPPORTED* is the share supported, as if the truth lay just below the limit; *wrong REFUTED* the
share refuted, as if it lay on it. Brackets hold 95 % Monte-Carlo intervals. *Missed*: coverage below 93 % or wrong
verdicts above 5 % by more than chance allows over all {3 * len(found)} rates. With fewer than 5 clusters that differ
the interval is an exact bound, which covers more than 95 %. Fewer than {stats.MIN_CLUSTERS} clusters or
{stats.MIN_CALLS} calls of sampled prompts are never supported, and rounds worth fewer than {stats.MIN_ROUNDS}
independent ones cannot decide. Intervals of speedups allow for rounds that depend on their neighbours, so they
cover more than 95 % where rounds are independent. Launches are independent in every world.
"""
    lines = [head]
    titles = ("Worlds that the methods were chosen on", "Fresh worlds, on which nothing was tuned")
    for title, part in zip(titles, parts, strict=True):
        if part:
            lines += [f"## {title}\n", *_table(part), ""]
    return "\n".join([*lines, *_null_lines(nulls), *_look_lines(looks)]).rstrip() + "\n"


def _table(found: Sequence[Row]) -> Iterator[str]:
    yield "| world | size | coverage, % | wrong SUPPORTED, % | wrong REFUTED, % | inconclusive, % | remark |"
    yield "|---|---|---|---|---|---|---|"
    for row in found:
        rates = f"{_percent(row.coverage)} | {_percent(row.supported)} | {_percent(row.refuted)}"
        undecided = _percent(row.undecided, bounds=False)
        yield f"| {row.tally.name} | {row.tally.size} | {rates} | {undecided} | {remark(row)} |"


def _verdict(found: Sequence[Row], num: int) -> str:
    missed = sum(row.missed is not None for row in found)
    if missed:
        return f"{missed} of {len(found)} worlds miss what is required."
    if num < ENOUGH:
        return f"{num} repetitions are too few to tell (at least {ENOUGH:,})."
    alpha = _alpha(len(found))
    unseen = max(k for k in range(num) if Rate(events=k, n=num).bounds(alpha)[0] <= WRONG) / num
    return (
        "No world is shown to miss what is required: 95 % intervals that cover the truth in at least 93 %, and at "
        f"most 5 % wrong verdicts at the boundary. Up to {100 * unseen:.1f} % seen in one world could still be chance."
    )


def _extremes(found: Sequence[Row]) -> str:
    """The rates without any allowance for chance except where stated."""
    coverages = [row.coverage.value for row in found if row.coverage.value is not None]
    worst = [max(found, key=lambda row: _value(rate_of(row)), default=None) for rate_of in (_supported, _refuted)]
    if worst[0] is None or worst[1] is None or not coverages:
        return "Nothing was simulated."
    shown = [
        f"wrong {name} {_percent(rate_of(row))} % ({row.tally.name}, {row.tally.size})"
        for name, rate_of, row in zip(("SUPPORTED", "REFUTED"), (_supported, _refuted), worst, strict=True)
        if row is not None
    ]
    above = [row for row in found for rate in (row.supported, row.refuted) if rate.bounds()[0] > WRONG]
    names = "; ".join(dict.fromkeys(f"{row.tally.name}, {row.tally.size}" for row in above))
    over = sum(value > COVERAGE[1] for value in coverages)
    exact = sum(_is_exact(row) for row in found if _over(row))
    return (
        f"As they came out: coverage {100 * min(coverages):.1f} to {100 * max(coverages):.1f} %, above 97 % in {over} "
        f"of {len(found)} worlds, in {exact} of which the exact bound answers in a tenth of the repetitions or more; "
        f"at the highest {' and '.join(shown)}. Of the {2 * len(found)} rates of wrong verdicts {len(above)} lie above "
        "5 % by more than their own Monte-Carlo interval (of rates that are 5 % exactly, 2.5 % do so by chance)"
        + (f": {names}." if above else ".")
    )


def _supported(row: Row) -> Rate:
    return row.supported


def _refuted(row: Row) -> Rate:
    return row.refuted


def _value(rate: Rate) -> float:
    return rate.value or 0.0


def _over(row: Row) -> bool:
    return row.coverage.value is not None and row.coverage.value > COVERAGE[1]


def _is_exact(row: Row) -> bool:
    """Whether exact bounds answer often enough to explain a high coverage."""
    return row.tally.num_exact >= MOSTLY * row.tally.num_found


def _null_lines(nulls: Sequence[NullTally]) -> Iterator[str]:
    if not nulls:
        return
    yield f"## A/A gate where nothing differs\n\n{nulls[0].num:,} gates of {PAIRS} pairs each. *Off*: some pair's"
    yield "99 % interval (Holm over the pairs) lies outside +-2 %: a false alarm; at most 1 % of these are intended."
    yield "*Too wide*: some pair's half-width is above 3 %: no error, the machine is too noisy for so few rounds.\n"
    yield "| noise of each timed call | size | off, % | too wide, % |\n|---|---|---|---|"
    for null in nulls:
        off, wide = (Rate(events=k, n=null.num) for k in (null.num_off, null.num_wide))
        yield f"| {null.name} | {null.size} | {_percent(off)} | {_percent(wide)} |"


def _look_lines(looks: Sequence[LookTally]) -> Iterator[str]:
    if not looks:
        return
    yield "\n## Looking again until a false claim is supported\n"
    yield f"{looks[0].num:,} attempts each, at the boundary, of up to {MOST_LOOKS} looks. *Uncorrected*: every look"
    yield "judged at 95 %. *Corrected*: each look after the first at the level that remains for it, so that all of them"
    yield "together err in less than 6 %.\n"
    yield "| world | size | wrong SUPPORTED at the first look, % | at any, uncorrected, % | at any, corrected, % |"
    yield "|---|---|---|---|---|"
    for look in looks:
        rates = (Rate(events=k, n=look.num) for k in (look.num_first, look.num_free, look.num_priced))
        yield f"| {look.name} | {look.size} | {' | '.join(map(_percent, rates))} |"


def as_csv(found: Sequence[Row], nulls: Sequence[NullTally], looks: Sequence[LookTally] = ()) -> str:
    """The counts, one line per world; columns that a kind of world does not have are empty."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    names = "kind world size repetitions with_interval covered supported refuted exact null_off null_too_wide remark"
    out.writerow(names.split())
    for row in found:
        t = row.tally
        counts = [t.num, t.num_found, t.num_covered, t.num_supported, t.num_refuted, t.num_exact]
        out.writerow(["interval", t.name, t.size, *counts, "", "", remark(row)])
    for null in nulls:
        out.writerow(["null", null.name, null.size, null.num, *[""] * 5, null.num_off, null.num_wide, ""])
    for look in looks:
        for kind, supported in (("looks free", look.num_free), ("looks at a price", look.num_priced)):
            out.writerow([kind, look.name, look.size, look.num, "", "", supported, *[""] * 5])
    return text.getvalue()


def _percent(rate: Rate, *, bounds: bool = True) -> str:
    if rate.value is None:
        return "none"
    low, high = rate.bounds()
    return f"{100 * rate.value:.1f}" + (f" [{100 * low:.1f}, {100 * high:.1f}]" if bounds else "")
