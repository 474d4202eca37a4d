"""The flips section: answers that only one of the models got right, the two texts side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from twotower_eval.analyse.compare.degenerate import flags
from twotower_eval.analyse.compare.documents import DocumentPair, document_pairs
from twotower_eval.analyse.compare.points import QualityPoint
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.report.section import Section
from twotower_eval.analyse.report.text import NONE, code, count, details, escape, lines_of, table
from twotower_eval.records import Generation

MAX_LOST, MAX_GAINED = 3, 1  # of each task; losses are what a claim is about
MAX_CHARACTERS = 400


def flips(runs: Runs) -> Section:
    """A handful of flipped answers per task at the headline's operating point, those with the lowest numbers."""
    title = "Flips: what the two models wrote"
    point = runs.shown.quality or next(iter(runs.quality), None)
    if point is None:
        return Section(title=title, markdown="Nothing has been scored in both arms, so nothing can have flipped.\n")
    flipped = [sample for sample in document_pairs(runs, point) if sample.change]
    shown = [sample for sample in flipped if sample.baseline and sample.candidate]
    lead = _lead(runs, point, flipped, shown)
    tasks = list(dict.fromkeys(sample.task for sample in shown))
    parts = [_of_task(task, [sample for sample in shown if sample.task == task]) for task in tasks]
    return Section(title=title, markdown="\n".join([lead, *parts]))


def _lead(runs: Runs, point: QualityPoint, flipped: Sequence[DocumentPair], shown: Sequence[DocumentPair]) -> str:
    lost = sum(sample.change == "lost" for sample in flipped)
    where = f"{escape(runs.name(point.candidate))}, run {code(point.run_id)}"
    text = f"At {where}: {count(lost)} documents lost, {count(len(flipped) - lost)} gained by the candidate. "
    if not flipped:
        return text + "No document flipped, so there is nothing to show.\n"
    if not shown:
        return text + "All of them were answered by likelihoods, so there are no texts to show.\n"
    return text + (
        f"Of each task up to {MAX_LOST} lost and {MAX_GAINED} gained ones, those with the lowest document numbers; "
        f"texts are cut after {MAX_CHARACTERS} characters.\n"
    )


def _of_task(task: str, flipped: Sequence[DocumentPair]) -> str:
    by_change = {change: [sample for sample in flipped if sample.change == change] for change in ("lost", "gained")}
    chosen = [*by_change["lost"][:MAX_LOST], *by_change["gained"][:MAX_GAINED]]
    rows = [row for sample in chosen for row in _row(sample)]
    summary = f"{task}: {count(len(by_change['lost']))} lost, {count(len(by_change['gained']))} gained"
    return details(summary, table(["document", "baseline says", "candidate says"], rows, left=3, verbatim=True))


def _row(sample: DocumentPair) -> Iterator[list[str]]:
    assert sample.baseline is not None
    assert sample.candidate is not None
    scores = f"{sample.baseline_score:g} to {sample.candidate_score:g}"
    yield [f"{sample.doc_id}: **{sample.change}**, {scores}", _text(sample.baseline), _text(sample.candidate)]


def _text(generation: Generation) -> str:
    """A text as it is, marked where it is cut, empty or degenerate."""
    text = generation.text
    if text is None:
        return f"{count(generation.num_tokens)} tokens without a text"
    more = len(text) - MAX_CHARACTERS
    shown = lines_of(text[:MAX_CHARACTERS]) or NONE
    notes = [f"{count(more)} more characters"] if more > 0 else []
    notes += [name.replace("_", " ") for name in flags(generation).names]
    return f"{shown} *({', '.join(notes)})*" if notes else shown
