"""Documents that are nearly the same and that no cluster id joins: the same passage, a template with other numbers.

A family fails or passes together, so that its members count as one. They are found by their own text, without the
few-shot examples that all prompts share: as sets of three words in a row, numbers all alike. Shingles that a quarter
of the documents hold are the task's own form and say nothing. What is left has to be long enough; of shorter texts
only equal ones are joined, so that a task of short made-up items is not taken for one document.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Shingles = NDArray[np.uint64]  # distinct, sorted

NUM_WORDS = 3
LEAST_SHINGLES = 8  # distinct ones, to call two texts alike
ALIKE = 0.5  # Jaccard: shared shingles over all of both; a word changed in twenty leaves 0.7
FORM_SHARE, FORM_LEAST = 0.25, 20  # of the documents, and at the least, that hold what is the form of a task
BANDS, ROWS = 32, 3  # of minhashes: a pair at 0.5 meets in some band with 99 % probability
COMPARED = 8  # earlier documents of a bucket that one is held against
# Scripts without spaces have a word in every character.
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\W\d_\u3040-\u30ff\u3400-\u9fff]+|\d+")


def families(texts: Sequence[str]) -> list[int]:
    """For each text the place of the first one of its family: its own where it is alone or the first.

    The same texts give the same families. Takes time in proportion to the texts.
    """
    firsts = list(range(len(texts)))
    shingles = _without_form([_shingles(text) for text in texts])
    seen: dict[str, int] = {}
    buckets: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    multipliers = np.random.default_rng(0).integers(1, 2**63, size=BANDS * ROWS, dtype=np.uint64) | np.uint64(1)
    for place, text in enumerate(texts):
        equal = seen.setdefault(" ".join(text.split()), place)
        if equal != place:
            _join(firsts, place, equal)
            continue
        own = shingles[place]
        if len(own) < LEAST_SHINGLES:
            continue
        least = (own[None, :] * multipliers[:, None]).min(axis=1)
        for band in range(BANDS):
            bucket = buckets[band, least[band * ROWS : (band + 1) * ROWS].tobytes()]
            for other in bucket:
                if _first(firsts, other) != _first(firsts, place) and _jaccard(own, shingles[other]) >= ALIKE:
                    _join(firsts, place, other)
            if len(bucket) < COMPARED:
                bucket.append(place)
    return [_first(firsts, place) for place in range(len(texts))]


def _shingles(text: str) -> Shingles:
    words = ["0" if word.isdigit() else word for word in WORD.findall(text.lower())]
    # Half of a surrogate pair, as web text may hold, is no UTF-8.
    rows = (words[i : i + NUM_WORDS] for i in range(len(words) - NUM_WORDS + 1))
    told = (" ".join(row).encode("utf-8", "surrogatepass") for row in rows if row != ["0"] * NUM_WORDS)
    return np.unique(np.fromiter((zlib.crc32(row) for row in told), dtype=np.uint64))


def _without_form(shingles: Sequence[Shingles]) -> list[Shingles]:
    """Without what so many documents hold that it is no sign of a family."""
    held = Counter(shingle for own in shingles for shingle in own.tolist())
    most = max(FORM_LEAST, FORM_SHARE * len(shingles))
    form = np.array(sorted(shingle for shingle, num in held.items() if num >= most), dtype=np.uint64)
    return [np.setdiff1d(own, form, assume_unique=True) for own in shingles]


def _jaccard(one: Shingles, other: Shingles) -> float:
    shared = len(np.intersect1d(one, other, assume_unique=True))
    return shared / (len(one) + len(other) - shared)


def _first(firsts: list[int], place: int) -> int:
    while firsts[place] != place:
        firsts[place] = firsts[firsts[place]]
        place = firsts[place]
    return place


def _join(firsts: list[int], one: int, other: int) -> None:
    low, high = sorted((_first(firsts, one), _first(firsts, other)))
    firsts[high] = low
