"""The speed section: speedups with their intervals, and how long a prompt waits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from twotower_eval.analyse import stats
from twotower_eval.analyse.compare.calls import Latency, WithinCalls
from twotower_eval.analyse.compare.figures import Counts
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.compare.warned import Incomplete
from twotower_eval.analyse.report.alone import batch_of, speed_alone, who
from twotower_eval.analyse.report.costs import explanation
from twotower_eval.analyse.report.frames import speed_frame
from twotower_eval.analyse.report.rendering import Column, Raw, interval, markdown, speedup_or_invalid, whole, words
from twotower_eval.analyse.report.text import (
    NONE,
    Section,
    bullets,
    code,
    count,
    details,
    escape,
    percent,
    rate,
    ratio,
    run_list,
    seconds,
    speed_findings,
    table,
    times,
)
from twotower_eval.analyse.words import finding_text
from twotower_eval.analyse.words.facts import best_text, method_line
from twotower_eval.records import Finding

MAX_SHOWN = 6  # measurements; of more than these, only the headline's stay unfolded
LEAD = (
    "S_time is the wall-clock speedup: the baseline's seconds over the candidate's for the same prompts, so above 1x "
    "the candidate is faster.\n\n"
)
READING = (
    "S_throughput compares useful tokens per second, so it differs where answers differ in length (length ratio: "
    "useful tokens, candidate over baseline). A/A null is the baseline against itself and should hold 1. Neighbouring"
    " rounds may be alike, as a machine is slow for a while: effective rounds are how many independent ones would say"
    " as much, by the lag-1 correlation of the rounds' own speedups in brackets, corrected for few rounds; fewer than"
    " 5 decide nothing. Intervals of S_time use an upper bound of the correlation, because few rounds estimate it "
    "poorly. Workload `fixed` makes a fixed number of tokens, `answer` stops where the task stops."
)


def speed(runs: Runs) -> Section:
    """Speedups, and what they are made of."""
    if not runs.speed:
        lines = bullets(escape(gap) for gap in runs.speed_gaps)
        what = "baseline and candidate" if runs.compare else "a model"
        text = speed_alone(runs) or f"Nothing has been timed completely. `twotower-eval speed` times {what}.\n"
        return Section(title="Speed", markdown=f"{text}\n{lines}" + _counts(_scored_cost(runs)))
    ordered = sorted(runs.speed, key=order)
    shown = ordered if len(ordered) <= MAX_SHOWN else [point for point in ordered if point.key == runs.chosen]
    rest = [point for point in ordered if point not in shown]
    parts = [
        LEAD + (_speedups(runs, shown) if shown else ""),
        details(f"The other {len(rest)} of {len(ordered)} measurements", _speedups(runs, rest)) if rest else "",
        bullets(_speed_remarks(runs)),
        explanation(runs, shown or ordered),
        details("How to read this table", READING),
        _lengths(runs, shown or ordered),
        _counts(_timed_cost(runs), _scored_cost(runs)),
        speed_alone(runs),
    ]
    return Section(title="Speed", markdown="\n\n".join(part.strip() for part in parts if part) + "\n")


def _lengths(runs: Runs, points: Sequence[SpeedPoint]) -> str:
    """The timed answers beside those of all documents, and how the time is spread over calls; folded away."""
    header = ["answers", "workload", "batch", "timed, all documents", "timed: median, 90th percentile"]
    header += [
        "all: median, 90th percentile",
        "at the budget: timed, all",
        "calls",
        "effective calls (Kish)",
        "longest call's share",
    ]
    rows = []
    for point in (point for point in points if point.lengths):
        tail = point.timed.tail
        for of_arm in point.lengths:
            timed, every = (" / ".join(f"{tokens:.0f}" for tokens in found) for found in of_arm.quantiles())
            at_budget = of_arm.shares_at_budget()
            name = "baseline" if of_arm.arm == "baseline" else escape(runs.name(point.candidate))
            there = f"{count(len(of_arm.all_tokens))}{'' if of_arm.whole else ' (not all)'}" if every else NONE
            numbers = f"{len(of_arm.timed_tokens):,}, {there}"
            row = [name, point.workload, count(point.batch_size), numbers, timed, every or NONE]
            row.append(NONE if at_budget is None else " / ".join(percent(share) for share in at_budget))
            row += [count(tail.num_calls), f"{tail.effective_calls:.0f}", percent(tail.largest_share)]
            rows.append(row)
    if not rows:
        return ""
    body = f"{LENGTH_WORDS}\n\n{table(header, rows, left=2)}"
    return details("Timed answers beside all answers", body)


def _counts(*tables: str) -> str:
    """Tokens and forwards, folded away: they explain the speedup and are many."""
    body = "\n\n".join(part.strip() for part in (COST_WORDS, *tables) if part)
    return details("Tokens and forwards", body) if any(tables) else ""


def order(point: SpeedPoint) -> tuple[str, int]:
    return (point.candidate.workload.name, point.batch_size)


def _speedups(runs: Runs, points: Sequence[SpeedPoint]) -> str:
    per_device = not all(point.equal_devices for point in runs.speed)
    columns = [
        Column(header=runs.point_header, show=words("operating_point")),
        Column(header="S_time [95 %]", show=speedup_or_invalid("time_speedup")),
        Column(header="S_throughput [95 %]", show=speedup_or_invalid("throughput_speedup")),
        Column(header="workload", show=words("workload_name"), text=True),
        Column(header="batch", show=whole("batch_size")),
        Column(header="rounds x calls", show=lambda row: f"{row['num_rounds']} x {row['num_calls']}"),
        Column(header="effective rounds (lag-1)", show=_independent),
        Column(header="length ratio [95 %]", show=interval("length_ratio", ratio)),
        Column(header="geometric mean [95 %]", show=speedup_or_invalid("geometric_speedup")),
        Column(header="A/A null [99 %]", show=interval("baseline_against_itself", times)),
    ]
    per_device_column = Column(header="S_time per device [95 %]", show=speedup_or_invalid("time_speedup_per_device"))
    return markdown(speed_frame(runs, points), [*columns, *[per_device_column] * per_device])


def _independent(row: Raw) -> str:
    """How many independent rounds would say as much, and how alike neighbouring rounds are."""
    if row["resamples_launches"] is None:
        return NONE
    if row["resamples_launches"]:
        return f"{row['num_launches']} launches"
    if row["lag1_correlation"] is None:
        return "too few to tell"
    return f"{row['effective_rounds']:.1f} ({row['lag1_correlation']:+.2f})"


def _widened(runs: Runs) -> Iterator[str]:
    found = [point.serial for point in runs.speed if point.serial is not None]
    if by := _times([serial.widening for serial in found if not serial.launches]):
        yield f"As rounds may be alike, their standard error is taken {by} times as large as that of independent ones."
    if by := _times([serial.widening for serial in found if serial.launches]):
        yield (
            f"What slows a launch may slow the next one too. So the standard error of launches is taken {by} times as "
            "large as if they were independent. Launches that are started further apart make it smaller."
        )


def _times(widenings: Sequence[float]) -> str:
    """How much wider; empty where nothing is."""
    if not widenings or max(widenings) <= 1:
        return ""
    least, most = f"{min(widenings):.1f}", f"{max(widenings):.1f}"
    return least if least == most else f"{least} to {most}"


def _speed_remarks(runs: Runs) -> Iterator[str]:
    run_ids = [run_id for point in runs.speed for run_id in point.run_ids]
    yield f"{'Runs' if len(set(run_ids)) > 1 else 'Run'} {run_list(run_ids)}. Warm-up rounds are not in these figures."
    methods = {method_line(point.time.estimate) for point in runs.speed if point.time.estimate}
    yield from (f"{method}." for method in sorted(methods))
    yield from _widened(runs)
    launches = [point.num_launches for point in runs.speed if not stats.resamples_launches(point.timed.launches)]
    if launches:
        yield f"{min(launches)} launch{'es' * (min(launches) > 1)}: variation between launches was not measured."
    bests = dict.fromkeys((point.workload, point.batch_size, best_text(point.best)) for point in runs.speed)
    for workload, batch_size, found in bests:
        yield f"Is the baseline at its best? {workload}, batch {count(batch_size)}: {escape(found)}."
    yield from _warnings(runs)
    reasons = {m.reason for p in runs.speed for m in (p.time, p.throughput, p.null) if m.reason}
    yield from (f"{NONE}: {escape(reason)}." for reason in sorted(reasons))
    yield from (f"{escape(gap)}." for gap in runs.speed_gaps)


INCOMPLETE = Finding(kind="complete_run", severity="warning", facts=Incomplete())


def _warnings(runs: Runs) -> Iterator[str]:
    """One line for each reason: how many measurements it concerns, and of which one the figures in it are."""
    concerned: dict[tuple[object, ...], list[tuple[Finding, SpeedPoint]]] = {}
    for point in runs.speed:
        unfinished = () if point.complete else (INCOMPLETE,)
        for one in (*unfinished, *speed_findings(point)):
            concerned.setdefault((one.severity, one.kind, one.facts.alike), []).append((one, point))
    for found in concerned.values():
        first, point = found[0]
        name = f"{escape(runs.name(point.candidate))}, {point.workload}, batch {point.batch_size}"
        differing = any(one != first for one, _ in found)
        figures = f" (the figures of {name}; those of the others differ)" if differing else ""
        every = f"every one of {len(found)} measurements" if len(found) > 1 else name
        some = f"{len(found)} of {len(runs.speed)} measurements" if len(found) > 1 else name
        yield f"{every if len(found) == len(runs.speed) else some}: {finding_text(first)}{figures}."


LENGTH_WORDS = (
    "A speedup is one of the prompts that were timed. Lengths are in useful tokens; those of all documents are known "
    "where a run of the same weights and decoder without a limit is among the runs, and the interval then allows for "
    "what the timed ones lack. Else it allows for answers that run on to the budget, as many as the known ones cannot "
    "exclude, and for a heavy tail beyond the longest. Effective calls (Kish): so many calls of equal length would "
    "tell as much."
)
COST_WORDS = (
    "What it costs. A forward is one pass of either tower for one prompt, NFE one pass of the denoiser. Tokens per "
    "forward are useful tokens over denoiser passes alone, over these and the passes that commit a block, and over all "
    "passes, prefill included; the three are not to be compared with each other. Discarded "
    "tokens were denoised past an answer's end and are never counted as output; forced commits are those that the step "
    "limit made below the threshold, as a share of all committed tokens."
)
COST_HEADER = ["tokens per NFE", "with commits", "with prefill and all else"]
COST_HEADER += ["denoiser forwards (NFE)", "context forwards"]
COST_HEADER += ["useful tokens", "discarded tokens", "forced commits", "ended by EOS / stop / length"]


def _cost(counts: Counts) -> list[str]:
    ends = " / ".join(count(counts.num_finished[reason]) for reason in ("eos", "stop", "length"))
    return [
        _optional(counts.tokens_per_nfe),
        _optional(counts.tokens_per_nfe_and_commit),
        _optional(counts.tokens_per_forward),
        count(counts.num_denoiser_forwards) if counts.num_denoiser_forwards else NONE,
        count(counts.num_context_forwards),
        count(counts.num_tokens),
        count(counts.num_discarded_tokens),
        NONE if counts.forced_share is None else percent(counts.forced_share),
        ends,
    ]


def _optional(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def _timed_cost(runs: Runs) -> str:
    header = [runs.point_header, "workload", "batch", "prompts timed", "useful tokens/s [95 %]", *COST_HEADER]
    rows, baselines = [], set()
    for point in sorted(runs.speed, key=order):
        setting = [f"{point.workload}", count(point.batch_size)]
        same = (point.baseline.id, point.run_ids)
        if same not in baselines:
            baselines.add(same)
            counts = point.baseline_counts
            rows.append(["baseline", *setting, count(counts.num_prompts), rate(point.baseline_rate), *_cost(counts)])
        name = escape(runs.name(point.candidate))
        rows.append([name, *setting, count(point.counts.num_prompts), rate(point.candidate_rate), *_cost(point.counts)])
    return table(header, rows, left=2)


def _scored_cost(runs: Runs) -> str:
    """The same counts for the outputs that retention rests on."""
    points = [point for point in runs.quality if point.counts.num_prompts and not point.timed]
    if not points:
        return ""
    rows: list[list[str]] = []
    for point in points:
        if all(other.baseline_counts != point.baseline_counts for other in points[: points.index(point)]):
            counts = point.baseline_counts
            rows.append(["baseline", count(counts.num_prompts), *_cost(counts), code(point.run_id)])
        name = escape(runs.name(point.candidate))
        rows.append([name, count(point.counts.num_prompts), *_cost(point.counts), code(point.run_id)])
    text = table([runs.point_header, "outputs", *COST_HEADER, "run"], rows)
    return f"In the scored runs:\n\n{text}"


WAIT = "Time from the start of a prompt's batch to its last useful token, all prompts of all measured rounds."
INSIDE = (
    "Within a timed call, medians over the measured calls: until all prompts of the batch are read, and until the "
    "first token of any of them (of block diffusion: the first block) is there."
)
MEMORY = " Peak memory is what tensors took at most in any of the calls."


@dataclass(frozen=True, kw_only=True)
class _Timed:
    """One cell that was timed."""

    name: str
    workload: str
    batch: str
    latency: Latency
    within: WithinCalls

    @property
    def setting(self) -> list[str]:
        return [self.name, self.workload, self.batch]


def latency(runs: Runs) -> Section:
    """How long one prompt waits for its last useful token: not the wall-clock time of its batch."""
    if not runs.speed and not runs.timed_alone:
        return Section(title="Latency", markdown="Nothing has been timed completely.\n")
    cells = [*_alone(runs), *_compared(runs)]
    first = runs.point_header if runs.speed else "model"
    rows = [
        [*cell.setting, count(cell.latency.n), seconds(cell.latency.median_s), seconds(cell.latency.p95_s)]
        for cell in cells
    ]
    body = table([first, "workload", "batch", "n", "median", "95th percentile"], rows, left=2)
    text = f"{WAIT}\n\n{_folded(runs, len(cells), 'Latency', body)}"
    if told := [cell for cell in cells if _tells(cell.within)]:
        with_memory = any(cell.within.peak_memory_bytes is not None for cell in told)
        body = _inside(first, told, with_memory)
        lead = INSIDE + MEMORY if with_memory else INSIDE
        text += f"\n{lead}\n\n{_folded(runs, len(told), 'Within calls', body)}"
    run_ids = [i for point in runs.speed for i in point.run_ids] + [i for one in runs.timed_alone for i in one.run_ids]
    return Section(title="Latency", markdown=f"{text}\nRuns: {run_list(run_ids)}.\n")


def _alone(runs: Runs) -> Iterator[_Timed]:
    for one in runs.timed_alone:
        workload = one.baseline.workload.kind
        name, batch = who(one.baseline), count(batch_of(one))
        yield _Timed(name=name, workload=workload, batch=batch, latency=one.latency, within=one.within)


def _compared(runs: Runs) -> Iterator[_Timed]:
    """Both arms of every comparison; a baseline that several candidates share once."""
    baselines = set()
    for point in sorted(runs.speed, key=order):
        workload, batch = point.workload, count(point.batch_size)
        same = (point.baseline.id, point.run_ids)
        if same not in baselines:
            baselines.add(same)
            found, within = point.baseline_latency, point.baseline_within
            yield _Timed(name="baseline", workload=workload, batch=batch, latency=found, within=within)
        name = escape(runs.name(point.candidate))
        yield _Timed(name=name, workload=workload, batch=batch, latency=point.latency, within=point.within)


def _folded(runs: Runs, num: int, what: str, body: str) -> str:
    return body if num <= MAX_SHOWN + 1 else details(f"{what} in {len(runs.speed)} measurements", body)


def _tells(within: WithinCalls) -> bool:
    return any(value is not None for value in (within.prefill_s, within.first_output_s, within.peak_memory_bytes))


def _inside(first: str, cells: list[_Timed], with_memory: bool) -> str:
    header = [first, "workload", "batch", "calls", "prompts read", "first output"]
    rows = []
    for cell in cells:
        within = cell.within
        moments = [NONE if s is None else seconds(s) for s in (within.prefill_s, within.first_output_s)]
        memory = NONE if within.peak_memory_bytes is None else f"{within.peak_memory_bytes / 2**30:.2f} GiB"
        rows.append([*cell.setting, count(within.num_calls), *moments, *([memory] if with_memory else [])])
    return table([*header, *(["peak memory"] if with_memory else [])], rows, left=2)
