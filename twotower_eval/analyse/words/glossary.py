"""One line for each term that a first reader of a report or a verdict cannot know, in the words of docs/glossary.md."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Term:
    """A term, what it means, and the pattern that finds it in a text."""

    name: str
    meaning: str
    pattern: str


TERMS = (
    Term(
        name="Operating point",
        meaning="a decoder with all of its parameters, such as its block size, steps and threshold. Another value of "
        "any parameter is another point.",
        pattern="operating points?",
    ),
    Term(
        name="Decoder-exercised",
        meaning="only the tasks whose answers the decoder made.",
        pattern="decoder-exercised",
    ),
    Term(
        name="NFE",
        meaning="number of function evaluations: denoise steps, each a forward of the denoiser.",
        pattern="NFE",
    ),
    Term(
        name="Forced commit",
        meaning="a commit below the threshold, made because every step has to commit at least one position.",
        pattern="forced commits?",
    ),
    Term(
        name="A/A null",
        meaning="the baseline timed against a second copy of itself. Its ratio has to be 1; how far it strays says how "
        "noisy the machine was.",
        pattern="A/A nulls?",
    ),
    Term(
        name="Residual",
        meaning="the part of a measured time that the parts, timed alone, do not explain.",
        pattern="residuals?",
    ),
    Term(
        name="Break-even",
        meaning="tokens per NFE at which both arms take equally long.",
        pattern="break-even",
    ),
    Term(
        name="Crossed bootstrap",
        meaning="prompts and rounds (or launches) are drawn with replacement, each on its own, and the statistic is "
        "computed again; its spread gives the interval.",
        pattern="crossed (paired )?bootstrap",
    ),
    Term(
        name="AUP",
        meaning="accuracy under parallelism: the area under accuracy over tokens per forward, where accuracy lost "
        "weighs heavily.",
        pattern="AUP",
    ),
    Term(
        name="Look",
        meaning="one run towards a claim. Every look counts; the more there are, the stricter each is judged.",
        pattern=r"(first|second|third|\w+th|further|many|the) looks?|look \d+",
    ),
    Term(
        name="Power line",
        meaning="the smallest drop of retention that these documents can show, printed before a run.",
        pattern="power line",
    ),
)


def terms_in(text: str) -> tuple[Term, ...]:
    """The terms that a text uses, in the order of :data:`TERMS`."""
    return tuple(term for term in TERMS if re.search(rf"\b(?:{term.pattern})\b", text, re.IGNORECASE))


def term_lines(text: str) -> list[str]:
    """``A/A null: the baseline timed against a second copy of itself. ...``, a line for each term that a text uses."""
    return [f"{term.name}: {term.meaning}" for term in terms_in(text)]
