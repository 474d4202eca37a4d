"""The latency section: how long a prompt waits, and what a timed call says of its inside."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from twotower_eval.analyse.compare.calls import Latency, WithinCalls
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.report.alone import batch_of, who
from twotower_eval.analyse.report.section import Section
from twotower_eval.analyse.report.speed_tables import MAX_SHOWN, order
from twotower_eval.analyse.report.text import NONE, count, details, escape, run_list, seconds, table

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
