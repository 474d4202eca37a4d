"""How servers answered: latencies, failures, and what they managed while they were loaded."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd

from twotower_eval.analyse.compare.requests import Requests
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.report.alone import model_name
from twotower_eval.analyse.report.rendering import (
    Column,
    Raw,
    frame_of,
    interval,
    markdown,
    optional,
    share,
    whole,
    words,
)
from twotower_eval.analyse.report.text import (
    NONE,
    Row,
    escape,
    measured_columns,
    operating_point,
    rate,
    seconds,
    significant,
)

LEAD = (
    "Requests to servers. A latency is that of a whole answer: at a rate from the moment when its request was due, "
    "whenever it was sent, else from when it was sent. Rates are those of the steady time of each round: of a closed "
    "loop until its last request is sent, at a rate from the first answer until the last request is due. A server "
    "keeps up with a rate if latencies do not grow from the first third of a round's requests to the last. Requests "
    "that failed are in no other figure."
)


def requests_frame(runs: Runs) -> pd.DataFrame:
    """One row for each timed cell behind a server; a baseline that several candidates share has one."""
    return frame_of(_rows(runs))


def _rows(runs: Runs) -> Iterator[Row]:
    seen = set()
    for one in runs.timed_alone:
        if one.requests is not None:
            yield _row(model_name(one.baseline), one.requests, one.run_ids)
    for point in runs.speed:
        arms = (("baseline", point.baseline_requests), (runs.name(point.candidate), point.requests))
        for name, found in arms:
            if found is not None and (found.cell.id, point.run_ids) not in seen:
                seen.add((found.cell.id, point.run_ids))
                yield _row(name, found, point.run_ids)


def _row(name: str, found: Requests, run_ids: tuple[str, ...]) -> Row:
    workload = found.cell.workload
    return {
        "name": name,
        "arm": found.cell.arm,
        **operating_point(found.cell),
        "requests": workload.requests or "batch",
        "request_rate": workload.request_rate,
        "in_flight": workload.batch_size,
        "num_requests": found.num,
        "failed_share": found.num_failed / found.num if found.num else None,
        "latency_median_s": found.median_s,
        "latency_p90_s": found.p90_s,
        "latency_p99_s": found.p99_s,
        "late_p99_s": found.late_s,
        **measured_columns("steady_answers_per_s", found.answers),
        **measured_columns("steady_tokens_per_s", found.tokens),
        **measured_columns("latency_growth", found.growth),
        "keeps_up": found.keeps_up,
        "cached_prompt_share": found.cached_share,
        "runs": " ".join(run_ids),
    }


def requests_table(runs: Runs) -> str:
    """The rows as a table under its explanation; empty where no model is behind a server."""
    frame = requests_frame(runs)
    if frame.empty:
        return ""
    columns = [
        Column(header=runs.point_header if runs.speed else "model", show=words("name")),
        Column(header="requests", show=_sent),
        Column(header="n", show=whole("num_requests")),
        Column(header="failed", show=share("failed_share")),
        Column(header="median", show=optional("latency_median_s", seconds)),
        Column(header="90th percentile", show=optional("latency_p90_s", seconds)),
        Column(header="99th", show=optional("latency_p99_s", seconds)),
        Column(header="answers/s, steady [95 %]", show=interval("steady_answers_per_s", rate)),
        Column(header="useful tokens/s, steady [95 %]", show=interval("steady_tokens_per_s", rate)),
    ]
    at_rates = bool(frame["request_rate"].notna().any())
    columns += [Column(header="keeps up", show=_keeps_up)] * at_rates
    if frame["cached_prompt_share"].notna().any():
        columns.append(Column(header="prompt tokens from its cache", show=share("cached_prompt_share")))
    reasons = sorted({str(row) for row in frame["steady_answers_per_s_reason"].dropna()} if _has_reason(frame) else ())
    why = "".join(f"\n{NONE}: {escape(reason)}.\n" for reason in reasons)
    return f"{LEAD}\n\n{markdown(frame, columns, left=2)}{why}"


def _has_reason(frame: pd.DataFrame) -> bool:
    return "steady_answers_per_s_reason" in frame.columns


def _sent(row: Raw) -> str:
    if row["request_rate"] is not None:
        return f"{row['request_rate']:g} a second ({row['requests']})"
    kept = int(row["in_flight"] or 1)
    return f"{kept} in flight" if row["requests"] == "closed" or kept == 1 else f"{kept} together"


def _keeps_up(row: Raw) -> str:
    """Whether a server keeps up with its rate, and if not, what it manages and how latencies grow."""
    if row["request_rate"] is None:
        return NONE
    if row["keeps_up"] is None:
        return "cannot be told"
    if row["keeps_up"]:
        return "yes"
    managed = row["steady_answers_per_s"]
    gave = "" if managed is None else f", gave {significant(managed)} answers/s of {row['request_rate']:g}"
    return f"**NO**: latencies grow by {row['latency_growth']:.2f}x{gave}"
