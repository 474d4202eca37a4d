"""The first two sections: the headline with one sentence to quote, and claims against what was measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import pandas as pd

from twotower_eval.analyse.claims import ClaimFile, judge, load_claims, ruling
from twotower_eval.analyse.claims.judge import outcome_text
from twotower_eval.analyse.claims.match import at_point, gather, is_about, names_subject, runs_for
from twotower_eval.analyse.claims.terms import SPEED_QUANTITIES, claimed_text, limits_text, own_limits, terms_text
from twotower_eval.analyse.claims.text import (
    against_text,
    chance_text,
    count_line,
    figure_text,
    look_remarks,
    retention_text,
    unchecked_text,
)
from twotower_eval.analyse.compare.figures import Measured, high_retention_text
from twotower_eval.analyse.compare.points import QualityPoint, checkpoint_name, long_name, short_name
from twotower_eval.analyse.compare.runs import Headline, Runs
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.report import alone
from twotower_eval.analyse.report.baselines import headline_lines
from twotower_eval.analyse.report.rendering import Column, Raw, frame_of, markdown, measured_at, words
from twotower_eval.analyse.report.tables import without_unclear
from twotower_eval.analyse.report.text import (
    NONE,
    Section,
    bullets,
    code,
    details,
    escape,
    measured_columns,
    retention,
    run_list,
    speed_findings,
    speedup,
    times,
    with_commands,
)
from twotower_eval.analyse.words import finding_text, gate_text
from twotower_eval.analyse.words.facts import method_text
from twotower_eval.analyse.words.gates import contradictions_text
from twotower_eval.names import config_name, plural
from twotower_eval.records import Checkpoint, Claim, Gate, GateLimits, OperatingPoint, Verdict, sizing_config
from twotower_eval.resources import data_path
from twotower_eval.rules import load_text
from twotower_eval.store import Run


class JudgedRuns(Runs):
    """Runs with the claims that they are held against, if any."""

    def __init__(self, runs: Sequence[Run], claims: ClaimFile | None = None) -> None:
        super().__init__(runs)
        self.claims = claims
        if self.headline_claim is not None:  # then everything is against that claim's baseline first
            self._look_at([*runs_for(self.headline_claim, Runs(runs))])

    @cached_property
    def verdicts(self) -> tuple[tuple[Claim, Verdict], ...]:
        """Every claim with its verdict, in the file's order."""
        if self.claims is None:
            return ()
        return tuple(zip(self.claims.claims, judge(self.claims.claims, self), strict=True))

    @cached_property
    def headline_claim(self) -> Claim | None:
        """The first joint claim, else the first one, of those about a checkpoint of these runs if there is any."""
        everything = self.claims.claims if self.claims else ()
        candidates = candidates_of(self)
        own = [claim for claim in everything if any(names_subject(claim, checkpoint) for checkpoint in candidates)]
        return next((one for one in own or everything if one.quantity == "joint"), next(iter(own or everything), None))

    @cached_property
    def headline(self) -> Headline:
        """What was measured at the operating point of the headline's claim; without claims what comes first."""
        claim = self.headline_claim
        if claim is None:
            return self.first
        parts = self.parts(claim)
        quality, speed = at_point(claim, parts, gather(self))
        scope = next((part.scope for part in parts if part.scope), ())
        return Headline(quality=quality, speed=speed, claim=claim, scope=scope)

    def parts(self, claim: Claim) -> list[Claim]:
        """The parts of a joint claim; of any other claim, itself."""
        return [one for one in (self.claims.claims if self.claims else ()) if one.name in claim.parts] or [claim]


def claimed_speedup(runs: Runs) -> Claim | None:
    """The claim of a speedup that costs of a size are held against: the headline's, else the file's first."""
    if not isinstance(runs, JudgedRuns) or runs.claims is None or runs.headline_claim is None:
        return None
    ordered = [*runs.parts(runs.headline_claim), *runs.claims.claims]
    return next((one for one in ordered if one.quantity in ("speedup_time", "speedup_throughput")), None)


def candidates_of(runs: Iterable[Run]) -> set[Checkpoint]:
    """The checkpoints that are candidates in any run."""
    return {cell.checkpoint for run in runs for cell in run.manifest.cells if cell.arm == "candidate"}


def shipped_claims(runs: Iterable[Run]) -> ClaimFile | None:
    """The shipped claim file about the models of these runs: the first one by name, ``None`` if there is none.

    Where all runs are on random weights, the one about a model of their config.
    """
    runs = list(runs)
    configs = {_config_of(run) for run in runs}
    for path in sorted(data_path("tasks", "claims").glob("*.toml")):
        found = load_claims(path)
        if any(is_about(claim, runs) for claim in found.claims):
            return found
        if found.config is not None and configs == {found.config}:
            return found
    return None


def _config_of(run: Run) -> str | None:
    """The name of the config whose size a run measured; ``None`` for any other run."""
    config = sizing_config(run.manifest.verb, run.manifest.plan)
    return None if config is None else config_name(config)


def verdict_line(runs: Runs) -> str:
    """The verdict to quote first, that of the headline's claim; empty without claims."""
    claim = runs.headline_claim if isinstance(runs, JudgedRuns) else None
    if claim is None or not isinstance(runs, JudgedRuns):
        return ""
    [verdict] = [verdict for one, verdict in runs.verdicts if one.name == claim.name]
    parts = runs.parts(claim)
    metrics = {one.name: found.metric for one, found in runs.verdicts}
    claimed = escape(" and ".join(claimed_text(part, metrics.get(part.name)) for part in parts))
    timed = any(part.quantity in SPEED_QUANTITIES for part in parts)
    outcome, at = outcome_text(verdict), _short_at(claim.point, timed)
    beside = against_text(verdict) + retention_text(verdict) + unchecked_text(verdict)
    beside += "".join(chance_text(part, found) for part, found in runs.verdicts if part in parts)
    at += escape(limits_text(parts))
    beside += "".join(f"; {remark}" for remark in look_remarks(claim, verdict))
    return f"**{outcome}**: claim {escape(claim.name)}, {claimed} at {at}: {escape(verdict.reason + beside)}."


NOTHING_TO_QUOTE = "**Nothing has been scored or timed completely yet, so there is nothing to quote.**"


def headline_sentence(runs: Runs) -> str:
    """The sentence to quote; of models that were measured alone, one for each."""
    if not runs.compare:
        return alone.sentence(runs)
    return _sentence(runs, runs.headline) if runs.points else NOTHING_TO_QUOTE


def points_text(runs: Runs) -> str:
    """How many operating points and measurements there were to choose from."""
    return (
        f"{len(runs.points)} operating points (decoder settings) were measured: {len(runs.quality)} measurements of "
        f"retention and {len(runs.speed)} of speed, counting batch sizes and workloads"
    )


def claims(runs: Runs) -> Section:
    """One row for each claim of the file, then its reasons and sources."""
    title = "Claimed against measured"
    if not isinstance(runs, JudgedRuns) or runs.claims is None:
        text = "No claim file names a checkpoint of these runs; `twotower-eval report --claims FILE` judges one.\n"
        return Section(title=title, markdown=text + _with_another_baseline(runs))
    frame = verdicts_frame(runs)
    parts = [
        f"{escape(runs.claims.title)}. {escape(count_line([verdict for _, verdict in runs.verdicts]))}.",
        _verdict_table(frame),
        _about_others(runs),
        details("Reasons, evidence and sources", bullets(_reason(*pair) for pair in runs.verdicts)),
        _looks(runs),
    ]
    text = "\n\n".join(part.strip() for part in parts if part) + "\n"
    return Section(title=title, markdown=text, tables={"verdicts": frame})


def verdicts_frame(runs: JudgedRuns) -> pd.DataFrame:
    """One row for each claim: what it says, what was measured, and how it was judged."""
    metrics = {one.name: found.metric for one, found in runs.verdicts}
    everything = [one for one, _ in runs.verdicts]
    return frame_of(
        {
            "claim": claim.name,
            "outcome": verdict.outcome,
            "scope": verdict.scope,
            "num_launches": verdict.num_launches,
            "quantity": claim.quantity,
            "relation": claim.relation,
            "expected": claim.expected,
            "margin": claim.margin,
            "limits": " ".join(f"{name}={own:g}" for name, (own, _) in own_limits(claim).items()),
            **measured_columns("measured", Measured(estimate=verdict.estimate)),
            **measured_columns("measured_above_chance", Measured(estimate=verdict.above_chance)),
            "tasks_near_chance": " ".join(verdict.near_chance),
            "reason": verdict.reason,
            "runs": " ".join(verdict.evidence),
            "num_points": verdict.num_points,
            "num_looks": verdict.num_looks,
            "declared_looks": claim.looks,
            "judged_at": verdict.level,
            "runs_not_given": " ".join(verdict.not_given),
            "source": claim.source,
            "verdict": outcome_text(verdict),
            "metric": verdict.metric,
            "equal_by_construction": _is_by_construction(verdict),
            "claimed": terms_text(claim, metrics, everything),
            "at": ", ".join(part for part in (long_name(claim.point.decoder), timing_text(claim.point)) if part),
        }
        for claim, verdict in runs.verdicts
    )


def _is_by_construction(verdict: Verdict) -> bool:
    return verdict.estimate is not None and verdict.estimate.method_kind == "equal_by_construction"


def _verdict_table(frame: pd.DataFrame) -> str:
    columns = [
        Column(header="claim", show=words("claim")),
        Column(header="verdict", show=lambda row: f"**{row['verdict']}**"),
        Column(header="measured", show=_measured),
        Column(header="claimed", show=words("claimed")),
        Column(header="at", show=words("at")),
    ]
    return markdown(frame, columns, left=len(columns))


def _measured(row: Raw) -> str:
    found = measured_at(row, "measured").estimate
    return NONE if found is None else figure_text(row["quantity"], found, row["metric"], row["equal_by_construction"])


def _with_another_baseline(runs: Runs) -> str:
    """Which shipped claims are about a candidate of these runs and another baseline; empty without any."""
    candidates = candidates_of(runs)
    files = [load_claims(path) for path in sorted(data_path("tasks", "claims").glob("*.toml"))]
    found = [one.claims for one in files if any(names_subject(c, cell) for c in one.claims for cell in candidates)]
    named = sorted({(claim.subject, claim.baseline) for claims in found for claim in claims})
    pairs = ", ".join(f"{escape(subject)} against {escape(baseline or 'any')}" for subject, baseline in named)
    return f"\nThe shipped claims are about other models ({pairs}), so none of them is judged.\n" if pairs else ""


def _about_others(runs: JudgedRuns) -> str:
    """Which claims of the file are about models that these runs do not have; empty where there are none."""
    others = [claim for claim, _ in runs.verdicts if not is_about(claim, runs)]
    if not others:
        return ""
    named = ", ".join(escape(claim.name) for claim in others)
    pairs = sorted({f"{escape(claim.subject)} against {escape(claim.baseline or 'any')}" for claim in others})
    return f"About other models than these runs have ({', '.join(pairs)}): {named}."


def _looks(runs: JudgedRuns) -> str:
    """How the verdicts chose among points and runs; nothing where there was no choice."""
    again = [(claim.name, verdict.num_looks) for claim, verdict in runs.verdicts if verdict.num_looks > 1]
    text = "Each claim is judged at its own point alone. " if len(runs.points) > 1 else ""
    if again:
        most = max(num for _, num in again)
        named = f"{len(again)} of {len(runs.verdicts)} claims" if len(again) > 1 else f"Claim {escape(again[0][0])}"
        were = "were each" if len(again) > 1 else "was"
        text += (
            f"{named} {were} looked at in several runs (up to {most}): whole tasks are judged before timed answers, "
            "and the most documents first; of speed like runs are taken together. Each look is judged at its own level."
        )
    return text


def _short_at(point: OperatingPoint, timed: bool) -> str:
    """``16/16/0.8 (block/steps/threshold), batch 1, answer workload``; the latter two where speed is claimed."""
    names = ["block", "steps", *(["threshold"] if "threshold" in point.decoder.params else [])]
    parts = [short_name(point.decoder) + (f" ({'/'.join(names)})" if "block_size" in point.decoder.params else "")]
    if timed:
        parts += [f"batch {point.batch_size}"] if point.batch_size is not None else []
        parts += [f"{point.request_rate:g} requests/s"] if point.request_rate is not None else []
        parts += [f"{point.workload} workload"] if point.workload is not None else []
    return escape(", ".join(parts))


def timing_text(point: OperatingPoint) -> str:
    """``batch 1, workload answer, devices 1``: how a point says that it is timed; empty where it leaves that open."""
    settings: list[tuple[str, Any]] = [("batch", point.batch_size), ("workload", point.workload)]
    settings += [("requests", point.requests), ("requests a second", point.request_rate)]
    settings += [("devices", point.num_devices), ("on", point.hardware)]
    return ", ".join(f"{name} {value}" for name, value in settings if value is not None)


def _reason(claim: Claim, verdict: Verdict) -> str:
    evidence = f"Runs {run_list(verdict.evidence)}." if verdict.evidence else "No run."
    n = f", n {verdict.estimate.n:,}" if verdict.estimate else ""
    if verdict.estimate and verdict.estimate.method_kind != "equal_by_construction":  # its reason says it already
        n += f", {method_text(verdict.estimate)}"
    beside = f"{against_text(verdict)}{retention_text(verdict)}{unchecked_text(verdict)}{chance_text(claim, verdict)}"
    beside += "".join(f"; {remark}" for remark in look_remarks(claim, verdict))
    reason = with_commands(f"{verdict.reason}{n}{beside}")
    return f"**{escape(claim.name)}** {outcome_text(verdict)}: {reason}. {evidence} Source: {escape(claim.source)}."


def headline(runs: Runs) -> Section:
    """The sentence to quote, and the caveats that belong to it."""
    if not runs.compare:
        return _alone(runs)
    found = runs.headline
    lines = [*_contradicting(runs), verdict_line(runs), *(_incomplete(run) for run in runs if not run.complete)]
    lines += [headline_sentence(runs), *(headline_lines(runs, found) if runs.points else [])]
    lines.append(bullets(_caveats(runs, found)))
    lines += [alone.sentence(runs)] if runs.scored_alone or runs.timed_alone else []
    return Section(title="Verdict", markdown="\n\n".join(line for line in lines if line) + "\n")


def _alone(runs: Runs) -> Section:
    """The headline of one model alone."""
    lines = [*_contradicting(runs), verdict_line(runs), *(_incomplete(run) for run in runs if not run.complete)]
    lines += [alone.sentence(runs), bullets(alone.remarks(runs))]
    return Section(title="One model alone", markdown="\n\n".join(line for line in lines if line) + "\n")


def _contradicting(runs: Runs) -> list[str]:
    """A warning for each run whose files contradict each other."""
    return [
        f"> **INVALID: the files of run {code(run_id)} contradict each other: {escape(contradictions_text(found))}.** "
        "No figure from it is evidence."
        for run_id, found in runs.contradictions.items()
    ]


def _incomplete(run: Run) -> str:
    rows = f"{len(run.scores):,} scores, {len(run.generations):,} generations, {len(run.speed):,} timed calls"
    return (
        f"> **INCOMPLETE: run {code(run.manifest.run_id)} has not finished.** So far: {rows}. Figures may still move."
    )


def _sentence(runs: Runs, found: Headline) -> str:
    """What was measured at the headline's point, and at no other."""
    quality, speed = found.quality, found.speed
    point = quality or speed
    if point is None:
        return _not_measured(runs, found)
    candidate = point.candidate
    who = f"{escape(checkpoint_name(candidate.checkpoint))} decoding with {escape(runs.name(candidate))}"
    kept = _kept(quality)
    faster = _faster(speed)
    if kept and faster and _apart(runs, found):
        apart = "They were measured under different settings and must not be quoted together."
        return f"**{who} keeps {kept}.** **It runs at {faster}.** {apart}"
    if kept and faster:
        return f"**{who} keeps {kept} at {faster}.**"
    if kept:
        reason = (speed and speed.time.reason) or f"not measured{_timed_so(found)}; `twotower-eval speed` measures it"
        return f"**{who} keeps {kept}.** Its speed: {reason}."
    if faster:
        reason = (quality and quality.headline.reason) or "not measured; `twotower-eval run` measures it"
        return f"**{who} runs at {faster}.** Its quality: {reason}."
    reasons = {reason for reason in (quality and quality.headline.reason, speed and speed.time.reason) if reason}
    return f"**{who}: nothing to quote.** {'; '.join(sorted(reasons))}."


def _apart(runs: Runs, found: Headline) -> list[Gate]:
    """Why the headline's quality and speed are not of one thing; nothing where they are, or where one is missing."""
    if found.quality is None or found.speed is None:
        return []
    return ruling.apart(runs, found.quality, found.speed, found.scope)


def _not_measured(runs: Runs, found: Headline) -> str:
    claim = found.claim
    assert claim is not None, "without a claim the headline is about a point that was measured"
    named = (claim.subject, claim.point.dtype, long_name(claim.point.decoder), timing_text(claim.point))
    at = escape(", ".join(part for part in named if part))
    text = f"**Nothing to quote: the claim's operating point was not measured ({at}).**"
    key = runs.first.key
    return f"{text} The tables begin with another, {escape(runs.name(runs.points[key]))}." if key else text


def _timed_so(found: Headline) -> str:
    """How the claim's speed is to be timed; empty where the claim leaves it open."""
    timing = "" if found.claim is None else timing_text(found.claim.point)
    return f" as the claim has it ({escape(timing)})" if timing else ""


def _kept(quality: QualityPoint | None) -> str | None:
    if quality is None or quality.headline.estimate is None:
        return None
    num_documents = sum(task.num_documents for task in quality.tasks)
    text = f"{retention(quality.headline)} of the baseline's quality on {plural(num_documents, 'document')}"
    if not quality.all_exercise_decoder and quality.exercised.estimate:
        text += f" ({retention(quality.exercised)} on the tasks that its decoder answers)"
    return text


def _faster(speed: SpeedPoint | None) -> str | None:
    if speed is None or speed.time.estimate is None:
        return None
    invalid = " (INVALID, see below)" if speed.invalid else ""
    return f"{times(speed.time)} its wall-clock speed{invalid}"


def _picked(found: Headline) -> str:
    """The rule by which the headline's point was picked."""
    if found.key is None:
        return "None of them is the claim's: "
    rule = "the claim's own" if found.claim else "the first of the plan, of those with both retention and speed if any"
    return f"The one above is {rule}, picked without a look at its result; "


def _of_quality(quality: QualityPoint) -> list[str]:
    """How many tasks and documents a retention rests on, and retention above chance."""
    num_documents = sum(task.num_documents for task in quality.tasks)
    num_exercising = sum(task.exercises_decoder for task in quality.tasks)
    what = f"{plural(len(quality.tasks), 'task')}, {plural(num_documents, 'document')}"
    lines = [f"Quality: {what}; {num_exercising} answered by the decoder. Run {run_list([quality.run_id])}."]
    above = quality.chance.headline
    if quality.chance.has_options:
        why = f" ({escape(above.reason)})" if above.reason else ""
        lines.append(f"With what guessing scores taken off both, it keeps {retention(above)}{why}.")
    unclear = without_unclear(quality.chance, quality.headline, quality.exercised)
    return [*lines, unclear] if unclear else lines


def _of_scope(quality: QualityPoint, scope: Sequence[str]) -> list[str]:
    """Tasks that the claim covers and the figure does not, and the other way round."""
    tasks = [task.name for task in quality.tasks]
    lacking, beside = [name for name in scope if name not in tasks], [name for name in tasks if name not in scope]
    lines = [f"The claim also covers {escape(', '.join(lacking))}, which this figure leaves out."] if lacking else []
    return [
        *lines,
        *([f"The claim does not cover {escape(', '.join(beside))}, which this figure takes in."] if beside else []),
    ]


def _caveats(runs: Runs, found: Headline) -> list[str]:
    lines = []
    quality, speed = found.quality, found.speed
    point = quality or speed
    if point is not None:
        who = f"{escape(checkpoint_name(point.baseline.checkpoint))}, {escape(long_name(point.baseline.decoder))}"
        lines.append(f"The baseline is {who}. Brackets hold 95 % intervals.")
    lines += [f"**Quality and speed are not of one thing.** {escape(gate_text(gate))}." for gate in _apart(runs, found)]
    kept = quality.headline.estimate.value if quality and quality.headline.estimate else 0.0
    if kept > GateLimits().warn_retention:
        lines.append(f"**Read this first:** {high_retention_text(kept)}.")
    lines += _of_quality(quality) if quality and quality.tasks else []
    if speed and speed.time.estimate:
        setting = f"{speed.workload} workload, {load_text(speed.candidate.workload)}"
        size = f"{plural(speed.num_rounds, 'round')} of {plural(speed.num_calls, 'timed call')}"
        useful = ""
        if speed.workload == "answer" and speed.throughput.estimate:
            useful = f"; {speedup(speed, speed.throughput)} in useful tokens per second"
        lines.append(f"Speed: {setting}, {size}{useful}. Run {run_list(speed.run_ids)}.")
    if len(runs.points) > 1:
        lines.append(
            f"{points_text(runs)}. {_picked(found)}a point picked from the tables below needs a new run on other "
            "documents before it is quoted."
        )
    lines += _of_scope(quality, found.scope) if quality and found.scope else []
    if quality and quality.equal_tasks:
        names = escape(", ".join(quality.equal_tasks))
        lines.append(
            f"Equal by construction: {names}, scored by the context tower that both arms share. This pulls the "
            "headline towards 100 %."
        )
    lines += [f"Quality: {finding_text(one)}." for one in (quality.warnings if quality else ())]
    lines += [f"Speed: {finding_text(one)}." for one in (speed_findings(speed) if speed else ())]
    return lines
