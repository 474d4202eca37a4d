"""What is found of runs once, however many points ask for it: all points of a report share their baseline."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from twotower_eval.store import Run

T = TypeVar("T")


def once(runs: Sequence[Run], what: tuple[Hashable, ...], compute: Callable[[], T]) -> T:
    """What ``compute`` gives of these runs, which is kept with the first of them and not computed again.

    ``what`` begins with a name of its own and holds everything else that the answer depends on. Nobody may change the
    answer. An error is raised each time.
    """
    kept, key = runs[0].found, (*what, *map(id, runs))
    if key not in kept:
        # The other runs are held as well, so that none that is made later has their ids.
        kept[key] = (compute(), [run for run in runs[1:] if run is not runs[0]])
    found: T = kept[key][0]
    return found


@contextmanager
def forgotten(run: Run) -> Iterator[None]:
    """What is found of a run within this block is not kept beyond it: it takes much room, and nobody asks again."""
    before = set(run.found)
    try:
        yield
    finally:
        for key in run.found.keys() - before:
            del run.found[key]
