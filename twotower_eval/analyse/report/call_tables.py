"""Lengths of answers, tokens and forwards, and how long a prompt waits: what timed and scored calls were made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import pandas as pd

from twotower_eval.analyse.compare.calls import Latency, Streamed, WithinCalls
from twotower_eval.analyse.compare.figures import Counts
from twotower_eval.analyse.compare.lengths import Lengths
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.report.alone import model_name
from twotower_eval.analyse.report.rates import MEMORY, gibibytes
from twotower_eval.analyse.report.rendering import (
    Column,
    Raw,
    Show,
    endings,
    fixed,
    frame_of,
    ids,
    interval,
    markdown,
    optional,
    share,
    whole,
)
from twotower_eval.analyse.report.requests import requests_frame, requests_table
from twotower_eval.analyse.report.text import (
    NONE,
    Row,
    Section,
    bullets,
    count_columns,
    details,
    escape,
    load_columns,
    measured_columns,
    operating_point,
    outputs_columns,
    percent,
    rate,
    run_list,
    seconds,
)
from twotower_eval.names import plural
from twotower_eval.records import Cell
from twotower_eval.rules import load_text

MAX_SHOWN = 6  # measurements; of more than these, only the headline's stay unfolded
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
WAIT = "Time from the start of a prompt's batch to its last useful token, all prompts of all measured rounds."
INSIDE = (
    "Within a timed call, medians over the measured calls: until all prompts of the batch are read, and until the "
    "first token of any of them (of block diffusion: the first block) is there."
)


def order(point: SpeedPoint) -> tuple[str, int]:
    """Measurements are shown by workload, then by batch size."""
    return (point.candidate.workload.name, point.batch_size)


def lengths_frame(runs: Runs) -> pd.DataFrame:
    """Lengths of timed answers and of all answers, and how the time is spread over calls: a row for each arm."""
    return frame_of(
        {
            "measurement": number,
            "runs": " ".join(point.run_ids),
            "arm": one.arm,
            **operating_point(point.candidate),
            "operating_point": runs.name(point.candidate),
            **load_columns(point.candidate.workload),
            **_length_values(one),
            "num_calls": point.timed.tail.num_calls,
            "effective_calls": point.timed.tail.effective_calls,
            "largest_call_share": point.timed.tail.largest_share,
        }
        for number, point in enumerate(runs.speed, start=1)
        for one in point.lengths
    )


def _length_values(one: Lengths) -> Row:
    none: tuple[None, None] = (None, None)
    timed, every = (found or none for found in one.quantiles())
    at_budget = one.shares_at_budget() or none
    return {
        "num_timed": len(one.timed_tokens),
        "num_all": len(one.all_tokens) if one.all_tokens else None,
        "all_are_whole_tasks": one.whole if one.all_tokens else None,
        "timed_median_tokens": timed[0],
        "timed_p90_tokens": timed[1],
        "all_median_tokens": every[0],
        "all_p90_tokens": every[1],
        "budget_tokens": one.budget,
        "timed_share_at_budget": at_budget[0],
        "all_share_at_budget": at_budget[1],
    }


def lengths(frame: pd.DataFrame) -> str:
    """The timed answers beside those of all documents, and how the time is spread over calls; folded away."""
    if frame.empty:
        return ""
    columns = [
        Column(header="answers", show=_arm),
        Column(header="workload", show=lambda row: str(row["workload"])),
        Column(header="batch", show=whole("batch_size")),
        Column(header="timed, all documents", show=_numbers),
        Column(header="timed: median, 90th percentile", show=_pair("timed_median_tokens", "timed_p90_tokens", _tokens)),
        Column(header="all: median, 90th percentile", show=_pair("all_median_tokens", "all_p90_tokens", _tokens)),
        Column(header="at the budget: timed, all", show=_pair("timed_share_at_budget", "all_share_at_budget", percent)),
        Column(header="calls", show=whole("num_calls")),
        Column(header="effective calls (Kish)", show=fixed("effective_calls", 0)),
        Column(header="longest call's share", show=share("largest_call_share")),
    ]
    body = f"{LENGTH_WORDS}\n\n{markdown(frame, columns, left=2)}"
    return details("Timed answers beside all answers", body)


def _tokens(number: float) -> str:
    """A length in whole tokens."""
    return f"{number:.0f}"


def _arm(row: Raw) -> str:
    return "baseline" if row["arm"] == "baseline" else escape(row["operating_point"])


def _numbers(row: Raw) -> str:
    every = NONE if row["num_all"] is None else whole("num_all")(row)
    return f"{whole('num_timed')(row)}, {every}{' (not all)' if row['all_are_whole_tasks'] is False else ''}"


def _pair(first: str, second: str, show: Callable[[float], str]) -> Show:
    return lambda row: NONE if row[first] is None else f"{show(row[first])} / {show(row[second])}"


def counts(runs: Runs, frame: pd.DataFrame) -> str:
    """Tokens and forwards, folded away: they explain the speedup and are many."""
    if frame.empty:
        return ""
    timed, scored = frame[frame["outputs"] == "timed"], frame[frame["outputs"] == "whole_tasks"]
    where = [
        Column(header="workload", show=lambda row: str(row["workload"])),
        Column(header="batch", show=whole("batch_size")),
        Column(header="prompts timed", show=whole("num_prompts")),
        Column(header="useful tokens/s [95 %]", show=interval("tokens_per_s", rate)),
    ]
    name, run = Column(header=runs.point_header, show=_arm), Column(header="run", show=ids("runs"))
    outputs = Column(header="outputs", show=whole("num_prompts"))
    tables = [markdown(timed, [name, *where, *_count_columns(timed)], left=2)] if len(timed) else []
    if len(scored):
        tables.append(f"In the scored runs:\n\n{markdown(scored, [name, outputs, *_count_columns(scored), run])}")
    return details("Tokens and forwards", "\n\n".join(part.strip() for part in (COST_WORDS, *tables)))


def counts_frame(runs: Runs) -> pd.DataFrame:
    """Tokens and forwards of each cell: of timed answers, then of those that retention rests on.

    A baseline that several candidates share has one row.
    """
    return frame_of([*_timed_counts(runs), *_scored_counts(runs)])


def _timed_counts(runs: Runs) -> Iterator[Row]:
    baselines = set()
    for point in sorted(runs.speed, key=order):
        setting = {"outputs": "timed", **load_columns(point.candidate.workload)}
        run_ids = {"runs": " ".join(point.run_ids)}
        same = (point.baseline.id, point.run_ids)
        if same not in baselines:
            baselines.add(same)
            rates = measured_columns("tokens_per_s", point.baseline_rate)
            yield {**_cell(runs, point.baseline), **setting, **counted(point.baseline_counts), **rates, **run_ids}
        rates = measured_columns("tokens_per_s", point.candidate_rate)
        yield {**_cell(runs, point.candidate), **setting, **counted(point.counts), **rates, **run_ids}


def _scored_counts(runs: Runs) -> Iterator[Row]:
    points = [point for point in runs.quality if point.counts.num_prompts and not point.timed]
    for i, point in enumerate(points):
        of_run = {"outputs": "whole_tasks", "runs": point.run_id}
        if all(other.baseline_counts != point.baseline_counts for other in points[:i]):
            yield {**_cell(runs, point.baseline), **of_run, **counted(point.baseline_counts)}
        yield {**_cell(runs, point.candidate), **of_run, **counted(point.counts)}


def _cell(runs: Runs, cell: Cell) -> Row:
    """Which arm a row is of, and how it decodes."""
    name = runs.name(cell) if cell.arm == "candidate" else None
    return {"arm": cell.arm, "operating_point": name, **operating_point(cell)}


def counted(counts: Counts) -> Row:
    """The columns of one arm's counts, without the arm in their names."""
    return {name.removeprefix("_"): value for name, value in count_columns("", counts).items()}


def _count_columns(frame: pd.DataFrame) -> list[Column]:
    drafts = [Column(header="draft model's forwards", show=_draft_forwards)]
    return [
        Column(header="tokens per NFE", show=fixed("tokens_per_nfe", 2)),
        Column(header="with commits", show=fixed("tokens_per_nfe_and_commit", 2)),
        Column(header="with prefill and all else", show=fixed("tokens_per_forward", 2)),
        Column(header="denoiser forwards (NFE)", show=partial(_forwards, "num_denoiser_forwards")),
        Column(header="context forwards", show=partial(_forwards, "num_context_forwards")),
        *(drafts if frame["num_draft_forwards"].notna().any() else ()),
        Column(header="useful tokens", show=whole("num_tokens")),
        Column(header="discarded tokens", show=whole("num_discarded_tokens")),
        Column(header="forced commits", show=share("forced_share")),
        Column(header="ended by EOS / stop / length", show=endings()),
    ]


def _draft_forwards(row: Raw) -> str:
    return NONE if pd.isna(row["num_draft_forwards"]) else whole("num_draft_forwards")(row)


def _forwards(name: str, row: Raw) -> str:
    """Forwards of a kind; a decoder without a denoiser has none of one, and behind a server none are counted."""
    return whole(name)(row) if row[name] else NONE


def forwards_frame(runs: Runs) -> pd.DataFrame:
    """What scored answers cost, both arms: one row for each measurement of retention."""
    return frame_of(
        {
            "run": point.run_id,
            "complete": point.complete,
            **operating_point(point.candidate),
            **outputs_columns(point.candidate),
            **count_columns("baseline", point.baseline_counts),
            **count_columns("candidate", point.counts),
            "operating_point": runs.name(point.candidate),
        }
        for point in runs.quality
        if point.counts.num_prompts
    )


def latency(runs: Runs) -> Section:
    """How long one prompt waits for its last useful token: not the wall-clock time of its batch."""
    frame = latency_frame(runs)
    if frame.empty:
        return Section(title="Latency", markdown="Nothing has been timed completely.\n")
    where = [
        Column(header=runs.point_header if runs.speed else "model", show=lambda row: escape(row["name"])),
        Column(header="workload", show=lambda row: str(row["workload"])),
        Column(header="batch", show=whole("batch_size")),
    ]
    waits = [
        Column(header="n", show=whole("num_prompts")),
        Column(header="median", show=optional("latency_median_s", seconds)),
        Column(header="95th percentile", show=optional("latency_p95_s", seconds)),
    ]
    text = f"{WAIT}\n\n{_folded(runs, len(frame), 'Latency', markdown(frame, [*where, *waits], left=2))}"
    inside = frame[frame[["prefill_median_s", "first_output_median_s", "peak_memory_bytes"]].notna().any(axis=1)]
    if len(inside):
        with_memory = bool(inside["peak_memory_bytes"].notna().any())
        body = markdown(inside, [*where, *_inside_columns(with_memory)], left=2)
        lead = INSIDE + MEMORY if with_memory else INSIDE
        text += f"\n{lead}\n\n{_folded(runs, len(inside), 'Within calls', body)}"
    if sent := requests_table(runs):
        text += f"\n{sent}\n"
    text += bullets(_arrivals(runs))
    run_ids = [i for point in runs.speed for i in point.run_ids] + [i for one in runs.timed_alone for i in one.run_ids]
    tables = {"latency": frame}
    if not (of_servers := requests_frame(runs)).empty:
        tables["requests"] = of_servers
    markdown_text = f"{text}\nRuns: {run_list(run_ids)}.\n"
    return Section(title="Latency", markdown=markdown_text, tables=tables)


def _arrivals(runs: Runs) -> Iterator[str]:
    """How answers arrived that servers gave in pieces, each timed cell once."""
    found: dict[str, tuple[str, WithinCalls]] = {}
    for one in runs.timed_alone:
        found.setdefault(one.baseline.id, (model_name(one.baseline), one.within))
    for point in sorted(runs.speed, key=order):
        found.setdefault(point.baseline.id, ("baseline", point.baseline_within))
        found.setdefault(point.candidate.id, (runs.name(point.candidate), point.within))
    sizes = {cell.id: load_text(cell.workload) for run in runs for cell in run.manifest.cells}
    for cell, (name, within) in found.items():
        if (came := within.streamed) is not None:
            yield f"{escape(name)}, {sizes[cell]}: {_arrival_text(came)}"


def _arrival_text(found: Streamed) -> str:
    of = f"(medians of {plural(found.num_answers, 'answer')})"
    if found.first_s is None:
        return (
            f"answers arrive in groups of about {found.tokens_per_arrival:.3g} tokens {of}, as those of parallel "
            "decoders do: there is no time to the first token and none between tokens, only that of whole answers"
        )
    after = "" if found.between_s is None else f", then one every {seconds(found.between_s)}"
    return f"answers arrive token by token: the first after {seconds(found.first_s)}{after} {of}"


def _inside_columns(with_memory: bool) -> list[Column]:
    memory = optional("peak_memory_bytes", gibibytes)
    return [
        Column(header="calls", show=whole("num_calls")),
        Column(header="prompts read", show=optional("prefill_median_s", seconds)),
        Column(header="first output", show=optional("first_output_median_s", seconds)),
        *[Column(header="peak memory", show=memory)] * with_memory,
    ]


def latency_frame(runs: Runs) -> pd.DataFrame:
    """One row for each timed cell: models alone, then both arms of every comparison, a shared baseline once."""
    return frame_of([*_latency_alone(runs), *_latency_compared(runs)])


def _latency_alone(runs: Runs) -> Iterator[Row]:
    for one in runs.timed_alone:
        yield _latency(model_name(one.baseline), one.baseline, one.latency, one.within, one.run_ids)


def _latency_compared(runs: Runs) -> Iterator[Row]:
    baselines = set()
    for point in sorted(runs.speed, key=order):
        same = (point.baseline.id, point.run_ids)
        if same not in baselines:
            baselines.add(same)
            found, within = point.baseline_latency, point.baseline_within
            yield _latency("baseline", point.baseline, found, within, point.run_ids)
        name = runs.name(point.candidate)
        yield _latency(name, point.candidate, point.latency, point.within, point.run_ids)


def _latency(
    name: str,
    cell: Cell,
    found: Latency,
    within: WithinCalls,
    run_ids: Sequence[str],
) -> Row:
    return {
        "name": name,
        "arm": cell.arm,
        **operating_point(cell),
        **load_columns(cell.workload),
        "num_prompts": found.n,
        "latency_median_s": found.median_s,
        "latency_p95_s": found.p95_s,
        "num_calls": within.num_calls,
        "prefill_median_s": within.prefill_s,
        "first_output_median_s": within.first_output_s,
        "peak_memory_bytes": within.peak_memory_bytes,
        "runs": " ".join(run_ids),
    }


def _folded(runs: Runs, num: int, what: str, body: str) -> str:
    return body if num <= MAX_SHOWN + 1 else details(f"{what} in {len(runs.speed)} measurements", body)
