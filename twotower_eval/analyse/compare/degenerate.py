"""Degenerate outputs: loops, padding, emptiness, junk behind an answer. Pure functions of a generation alone.

Loops are the fastest outputs there are, so that a speedup is worth little without knowing how many they were. A limit
below is where no canonical answer of GSM8K (train and test), MATH-500, HumanEval, MBPP or the miniature's tasks lies,
and where planted loops and padding do: tests hold it to both. The flags are a diagnosis, never a verdict.

Text is looked at where a generation has it; token ids always, because padding may be written as nothing.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from twotower_eval.records import Generation

MAX_PERIOD = 400  # symbols: a paragraph of which a model writes copies; longer ones compress far too well anyway
MIN_REPEATS = 3.0  # a refrain may come twice
# Rules and separators ("-" * 20), indentation, the zeros of a big number and a matrix of 0s all end real answers.
MIN_TEXT_SPAN, MIN_TOKEN_SPAN = 32, 16
# A short period must come back far more often: "1, 1, 1, 1, 1" is a list, and a test may assert [0] * 10.
MIN_SHORT_REPEATS, SHORT_PERIOD = 8.0, 8

MIN_COMPRESSIBLE_BYTES = 160  # below it zlib's own 8 to 20 bytes and its first window decide the ratio
MAX_COMPRESSION = 0.15  # canonical answers, spaces collapsed, stay above 0.19; ten copies of a line reach 0.1

NGRAM = 4
MIN_NGRAMS = 32  # fewer: a few equal lines of code would make a large share
MAX_REPEATED = 0.85  # share of n-grams seen before; canonical answers reach 0.77, in aligned chains of trigonometry

# What begins the next item of a few-shot prompt: an answer was over before it.
# At the beginning of a line only: docstrings hold such words indented.
NEXT_ITEM = re.compile(r"\n(?:Q|Question|Problem|Exercise|User|Human|Instruction) ?\d* ?:", re.IGNORECASE)

_WORDS = re.compile(r"\w+|[^\w\s]")
_SPACES = re.compile(r"\s+")


@dataclass(frozen=True, kw_only=True)
class Flags:
    """What is wrong with one output, and the figures that say so (``None`` where it is too short to tell).

    ``period`` and ``num_repeats`` are of the tail's loop, in characters of text or, without text, in tokens; of
    ``compression`` (compressed over raw bytes) less is worse, of ``repeated_share`` (of n-grams of words) more.
    """

    empty: bool
    periodic_tail: bool
    compressible: bool
    repeated_ngrams: bool
    junk_after_answer: bool
    period: int | None
    num_repeats: float | None
    compression: float | None
    repeated_share: float | None

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The flags that are raised."""
        return tuple(name for name in FLAG_NAMES if getattr(self, name))

    @cached_property
    def degenerate(self) -> bool:
        """Whether any is raised."""
        return bool(self.names)


FLAG_NAMES = ("empty", "periodic_tail", "compressible", "repeated_ngrams", "junk_after_answer")


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The end of a sequence that repeats itself: ``num_repeats`` times ``period`` symbols, from ``start`` on."""

    period: int
    num_repeats: float
    start: int


def flags(generation: Generation) -> Flags:
    """Flags of one output, from its useful tokens and text."""
    return _flags(generation.text, generation.token_ids, generation.finish == "length")


@lru_cache(maxsize=100_000)  # greedy decoding gives the same output in every round
def _flags(text: str | None, token_ids: tuple[int, ...], unended: bool) -> Flags:
    words: Sequence[object] = token_ids if text is None else _WORDS.findall(text)
    of_text = None if text is None else periodic_tail(text, MIN_TEXT_SPAN)
    loop = of_text or periodic_tail(token_ids, MIN_TOKEN_SPAN)
    head: Sequence[object] = ""
    if loop is not None:
        head = text[: loop.start] if text is not None and of_text else token_ids[: loop.start]
    compression, repeated_share = compression_ratio(_raw(text, token_ids)), repeated_ngram_share(words)
    return Flags(
        empty=not token_ids or (text is not None and not text.strip()),
        periodic_tail=loop is not None,
        compressible=compression is not None and compression < MAX_COMPRESSION,
        repeated_ngrams=repeated_share is not None and repeated_share > MAX_REPEATED,
        junk_after_answer=_holds_something(head) or (unended and _goes_on(text)),
        period=loop.period if loop else None,
        num_repeats=loop.num_repeats if loop else None,
        compression=compression,
        repeated_share=repeated_share,
    )


def periodic_tail(symbols: Sequence[object], min_span: int) -> Loop | None:
    """The loop that a sequence ends in, by its shortest period; ``None`` without one that is long enough.

    The last repeat may be cut off, as a budget does, and counts by its share.
    """
    for period in range(1, min(MAX_PERIOD, len(symbols) // 2) + 1):
        if symbols[-1] != symbols[-1 - period]:
            continue
        span = period + _matching(symbols, period)
        least = MIN_SHORT_REPEATS if period < SHORT_PERIOD else MIN_REPEATS
        if span >= min_span and span / period >= least:
            return Loop(period=period, num_repeats=span / period, start=len(symbols) - span)
    return None


def _matching(symbols: Sequence[object], period: int) -> int:
    """How many symbols at the end equal the one a period before."""
    matching = 0
    for new, old in zip(reversed(symbols), reversed(symbols[:-period]), strict=False):
        if new != old:
            break
        matching += 1
    return matching


def compression_ratio(raw: bytes) -> float | None:
    """Compressed over raw size; ``None`` below the length from which it means something."""
    return len(zlib.compress(raw, 9)) / len(raw) if len(raw) >= MIN_COMPRESSIBLE_BYTES else None


def repeated_ngram_share(words: Sequence[object]) -> float | None:
    """Share of n-grams that came before in the same output; ``None`` where there are too few to tell."""
    ngrams = [tuple(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if len(ngrams) >= MIN_NGRAMS else None


def _holds_something(head: Sequence[object]) -> bool:
    """Whether there is an answer in front of a loop."""
    return bool(head.strip() if isinstance(head, str) else head)


def _goes_on(text: str | None) -> bool:
    """Whether the text of an output that nothing ended begins a new question behind an answer."""
    found = None if text is None else NEXT_ITEM.search(text)
    return found is not None and text is not None and bool(text[: found.start()].strip())


def _raw(text: str | None, token_ids: Sequence[int]) -> bytes:
    """What is compressed. Spaces are collapsed: deep indentation is no loop, and one of spaces is a periodic tail."""
    if text is None:
        return b"".join(token.to_bytes(4, "little") for token in token_ids)
    return _SPACES.sub(" ", text).encode("utf-8", "surrogatepass")
