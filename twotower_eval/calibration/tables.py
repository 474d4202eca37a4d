"""The calibration as Markdown for people and CSV for programs: rates with their Monte-Carlo intervals, and misses."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from twotower_eval import stats
from twotower_eval.calibration.simulate import PAIRS, NullTally, Tally

COVERAGE = (0.93, 0.97)
WRONG = 0.05
MC_LEVEL = 0.95  # of the Monte-Carlo intervals printed
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
    """One world's rates, and a remark on what is not as required."""

    tally: Tally
    coverage: Rate
    supported: Rate
    refuted: Rate
    undecided: Rate
    remark: str

    @property
    def missed(self) -> bool:
        """Whether this world breaks what is required, beyond Monte-Carlo error."""
        return self.remark.startswith("MISSED")


def rows(tallies: Sequence[Tally]) -> tuple[Row, ...]:
    """Judge every world; a miss must be beyond chance over the three rates of all worlds together (Bonferroni)."""
    alpha = MISS_ALPHA / max(3 * len(tallies), 1)
    return tuple(_row(tally, alpha) for tally in tallies)


def _row(tally: Tally, alpha: float) -> Row:
    supported, refuted = (Rate(events=k, n=tally.num) for k in (tally.num_supported, tally.num_refuted))
    undecided = Rate(events=tally.num - tally.num_supported - tally.num_refuted, n=tally.num)
    coverage = Rate(events=tally.num_covered, n=tally.num_found)
    _, high = coverage.bounds(alpha)
    remark = ""
    if high < COVERAGE[0]:
        remark = "MISSED: coverage"
    elif max(supported.bounds(alpha)[0], refuted.bounds(alpha)[0]) > WRONG:
        remark = "MISSED: wrong verdicts"
    elif coverage.value is not None and coverage.value > COVERAGE[1]:
        share = f"exact bound in {100 * tally.num_exact / max(tally.num_found, 1):.0f} %"
        remark = f"conservative: {share}" if tally.num_exact else "conservative: widened for what small samples lack"
    if tally.num_found < tally.num:
        none = f"no interval in {100 * (1 - tally.num_found / tally.num):.1f} %, so no verdict"
        remark = f"{remark}; {none}" if remark else none
    return Row(tally=tally, coverage=coverage, supported=supported, refuted=refuted, undecided=undecided, remark=remark)


def as_markdown(
    found: Sequence[Row], nulls: Sequence[NullTally], *, num_resamples: int, seed: int, version: str
) -> str:
    """The whole report."""
    num = max((row.tally.num for row in found), default=0)
    missed = sum(row.missed for row in found)
    too_few = f"{num} repetitions are too few to tell (at least {ENOUGH:,})"
    verdict = (
        f"{missed} of {len(found)} worlds miss what is required"
        if missed
        else "No world is shown to miss what is required, though these repetitions cannot rule out small misses"
    )
    verdict = verdict if num >= ENOUGH or missed else too_few
    lowest = min((row.coverage.value for row in found if row.coverage.value is not None), default=0.0)
    most = [max((rate.value or 0.0 for rate in rates), default=0.0) for rates in _wrong(found)]
    head = f"""# Calibration of intervals and verdicts

**{verdict}**: 95 % intervals cover the truth in 93 to 97 % of repetitions, or more where marked conservative, and at
the boundary no more than 5 % of verdicts are wrong either way. A world misses where a rate is beyond its limit by more
than chance allows over the {3 * len(found)} rates of the table. As they came out, without that allowance: coverage
{100 * lowest:.1f} % at the lowest, wrong SUPPORTED {100 * most[0]:.1f} % and wrong REFUTED {100 * most[1]:.1f} % at the
highest.

{num:,} repetitions per world, {num_resamples:,} resamples per interval, seed {seed}, version {version}. Every
repetition goes through the functions that reports and claims use: `stats.retention`, `stats.speedup`, `stats.decide`.
The claim judged is that the quantity is at least its true value, with no margin. *Wrong SUPPORTED* is the share
supported, as if the truth lay a hair below the limit; *wrong REFUTED* the share refuted, as if it lay on it. Fewer than
{stats.MIN_CLUSTERS} clusters or {stats.MIN_CALLS} calls of sampled prompts are never supported. Brackets hold 95 %
Monte-Carlo intervals.
"""
    lines = ["| world | size | coverage, % | wrong SUPPORTED, % | wrong REFUTED, % | inconclusive, % | remark |"]
    lines.append("|---|---|---|---|---|---|---|")
    lines += [
        f"| {row.tally.name} | {row.tally.size} | {_percent(row.coverage)} | {_percent(row.supported)} "
        f"| {_percent(row.refuted)} | {_percent(row.undecided, bounds=False)} | {row.remark} |"
        for row in found
    ]
    return "\n".join([head, *lines, *_null_lines(nulls)]) + "\n"


def _wrong(found: Sequence[Row]) -> tuple[list[Rate], list[Rate]]:
    return [row.supported for row in found], [row.refuted for row in found]


def _null_lines(nulls: Sequence[NullTally]) -> Iterator[str]:
    if not nulls:
        return
    yield f"\n## A/A gate where nothing differs\n\n{nulls[0].num:,} gates of {PAIRS} pairs each. *Off*: some pair's"
    yield "99 % interval (Holm over the pairs) lies outside +-2 %: a false alarm; at most 1 % of these are intended."
    yield "*Too wide*: some pair's half-width is above 3 %: no error, the machine is too noisy for so few rounds.\n"
    yield "| noise of each timed call | size | off, % | too wide, % |\n|---|---|---|---|"
    for null in nulls:
        off, wide = (Rate(events=k, n=null.num) for k in (null.num_off, null.num_wide))
        yield f"| {null.name} | {null.size} | {_percent(off)} | {_percent(wide)} |"


def as_csv(found: Sequence[Row], nulls: Sequence[NullTally]) -> str:
    """Counts as they are, one line per world; what a kind of world does not have is empty."""
    text = io.StringIO()
    out = csv.writer(text, lineterminator="\n")
    names = "kind world size repetitions with_interval covered supported refuted exact null_off null_too_wide remark"
    out.writerow(names.split())
    for row in found:
        t = row.tally
        counts = [t.num, t.num_found, t.num_covered, t.num_supported, t.num_refuted, t.num_exact]
        out.writerow(["interval", t.name, t.size, *counts, "", "", row.remark])
    for null in nulls:
        out.writerow(["null", null.name, null.size, null.num, *[""] * 5, null.num_off, null.num_wide, ""])
    return text.getvalue()


def _percent(rate: Rate, *, bounds: bool = True) -> str:
    if rate.value is None:
        return "none"
    low, high = rate.bounds()
    return f"{100 * rate.value:.1f}" + (f" [{100 * low:.1f}, {100 * high:.1f}]" if bounds else "")
