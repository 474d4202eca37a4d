"""One line for each term that a first reader of a report or a verdict cannot know, in the words of docs/glossary.md."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Term:
    """A term, what it means, and the pattern that finds it in a text."""

    name: str
    meaning: str
    pattern: re.Pattern[str]


def _words(pattern: str) -> re.Pattern[str]:
    """Whole words in upper or lower case."""
    return re.compile(rf"\b(?:{pattern})\b", re.IGNORECASE)


TERMS = (
    Term(
        name="Operating point",
        meaning="a decoder with all of its parameters, such as its block size, steps and threshold. Another value of "
        "any parameter is another point.",
        pattern=_words("operating points?"),
    ),
    Term(
        name="Decoder-exercised",
        meaning="only the tasks whose answers the decoder made.",
        pattern=_words("decoder-exercised"),
    ),
    Term(
        name="NFE",
        meaning="number of function evaluations: denoise steps, each a forward of the denoiser.",
        pattern=_words("NFE"),
    ),
    Term(
        name="Forced commit",
        meaning="a commit below the threshold, made because every step has to commit at least one position.",
        pattern=_words("forced commits?"),
    ),
    Term(
        name="A/A null",
        meaning="the ratio of two copies of the baseline, timed like two arms. It has to be 1; how far it strays says "
        "how noisy the machine was.",
        pattern=_words("A/A nulls?"),
    ),
    Term(
        name="Residual",
        meaning="the part of a measured time that the parts, timed alone, do not explain.",
        pattern=_words("residuals?"),
    ),
    Term(
        name="Break-even",
        meaning="tokens per NFE at which both arms take equally long.",
        pattern=_words("break-even"),
    ),
    Term(
        name="Crossed bootstrap",
        meaning="prompts and rounds (or launches) are drawn with replacement, each on its own, and the statistic is "
        "computed again; its spread gives the interval.",
        pattern=_words("crossed (paired )?bootstrap"),
    ),
    Term(
        name="AUP",
        meaning="accuracy under parallelism: the area under accuracy over tokens per forward, where accuracy lost "
        "weighs heavily.",
        pattern=_words("AUP"),
    ),
    Term(
        name="Look",
        meaning="one run towards a claim. Every look counts; the more there are, the stricter each is judged.",
        pattern=_words(r"(first|second|third|\w+th|further|many|the) looks?|look \d+"),
    ),
    Term(
        name="Power line",
        meaning="the smallest drop of retention that these documents can show, printed before a run.",
        pattern=_words("power line"),
    ),
)


def terms_in(text: str) -> tuple[Term, ...]:
    """The terms that a text uses, in the order of :data:`TERMS`."""
    return tuple(term for term in TERMS if term.pattern.search(text))


def term_lines(text: str) -> list[str]:
    """``Residual: the part of a measured time that ...``, a line for each term that a text uses."""
    return [f"{term.name}: {term.meaning}" for term in terms_in(text)]
