"""The headline: the verdict and one sentence to quote, and what a reader must know before quoting it."""

from __future__ import annotations

from collections.abc import Sequence

from twotower_eval.analyse.claims import joint_gates
from twotower_eval.analyse.compare.naming import checkpoint_name, long_name
from twotower_eval.analyse.compare.numbers import high_retention_text
from twotower_eval.analyse.compare.points import QualityPoint
from twotower_eval.analyse.compare.runs import Headline, Runs
from twotower_eval.analyse.compare.timing import SpeedPoint
from twotower_eval.analyse.report import alone
from twotower_eval.analyse.report.section import Section
from twotower_eval.analyse.report.tables import without_unclear
from twotower_eval.analyse.report.text import (
    bullets,
    code,
    escape,
    plural,
    retention,
    run_list,
    speed_findings,
    speedup,
    times,
)
from twotower_eval.analyse.report.verdicts import points_text, timing_text, verdict_line
from twotower_eval.analyse.words import finding_text, gate_text
from twotower_eval.analyse.words.contradictions import contradictions_text
from twotower_eval.records import Gate, GateLimits
from twotower_eval.store import Run


def headline(runs: Runs) -> Section:
    """One sentence to quote, and what a reader must know before quoting it."""
    if not runs.compare:
        return _alone(runs)
    found = runs.headline
    lines = [*_contradicting(runs), verdict_line(runs), *(_incomplete(run) for run in runs if not run.complete)]
    if not runs.points:
        lines.append("**Nothing has been scored or timed completely yet, so there is nothing to quote.**")
    else:
        lines.append(_sentence(runs, found))
    lines.append(bullets(_caveats(runs, found)))
    lines += [alone.sentence(runs)] if runs.scored_alone or runs.timed_alone else []
    return Section(title="Verdict", markdown="\n\n".join(line for line in lines if line) + "\n")


def _alone(runs: Runs) -> Section:
    """The same of one model alone."""
    lines = [*_contradicting(runs), verdict_line(runs), *(_incomplete(run) for run in runs if not run.complete)]
    lines += [alone.sentence(runs), bullets(alone.remarks(runs))]
    return Section(title="One model alone", markdown="\n\n".join(line for line in lines if line) + "\n")


def _contradicting(runs: Runs) -> list[str]:
    """Before anything is quoted: what follows is from files of which some are not what they were."""
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
    return joint_gates.apart(runs, found.quality, found.speed, found.scope)


def _not_measured(runs: Runs, found: Headline) -> str:
    claim = found.claim
    assert claim is not None, "without a claim the headline is about a point that was measured"
    named = (claim.subject, claim.point.dtype, long_name(claim.point.decoder), timing_text(claim.point))
    at = escape(", ".join(part for part in named if part))
    text = f"**Nothing to quote: the claim's operating point was not measured ({at}).**"
    key = runs.first.key
    return f"{text} The tables begin with another, {escape(runs.name(runs.points[key]))}." if key else text


def _timed_so(found: Headline) -> str:
    """How the claim wants its speed to be timed, where it says so."""
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
    """By which rule the point above was picked."""
    if found.key is None:
        return "None of them is the claim's: "
    rule = "the claim's own" if found.claim else "the first of the plan, of those with both retention and speed if any"
    return f"The one above is {rule}, picked without a look at its result; "


def _of_quality(quality: QualityPoint) -> list[str]:
    """What a retention rests on, and what is left of it above guessing."""
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
    """Where the tasks that the sentence is over are not those of the claim."""
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
        setting = f"{speed.workload} workload, batch {speed.batch_size}"
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
