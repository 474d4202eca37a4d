"""Calibration: simulated worlds with known truth, and how often intervals and verdicts are right in them.

``quality_worlds``, ``speed_worlds``, ``tail_worlds`` and ``serial_worlds`` draw data, ``look_worlds`` look several
times, ``simulate`` counts, ``tables`` judges and prints. What is judged are the functions of ``stats``, as reports and
claims call them.
"""

from __future__ import annotations

from pathlib import Path

from twotower_eval.analyse.calibration.look_worlds import calibrate_looks, look_worlds
from twotower_eval.analyse.calibration.quality_worlds import fresh_quality_worlds, quality_worlds
from twotower_eval.analyse.calibration.simulate import calibrate_null, calibrate_quality, calibrate_speed
from twotower_eval.analyse.calibration.speed_worlds import (
    fresh_serial_worlds,
    fresh_speed_worlds,
    null_worlds,
    serial_worlds,
    speed_worlds,
)
from twotower_eval.analyse.calibration.tables import as_csv, as_markdown, rows
from twotower_eval.analyse.calibration.tail_worlds import family_worlds, fresh_tail_worlds, tail_worlds
from twotower_eval.errors import UserError
from twotower_eval.progress import Progress, SilentProgress
from twotower_eval.version import __version__

NUM_REPETITIONS = 1_000
NUM_RESAMPLES = 1_000


def calibrate(
    out: Path,
    *,
    num_repetitions: int = NUM_REPETITIONS,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Simulate every world and write ``calibration.md`` and ``calibration.csv`` to ``out``; returns the former.

    Files are written at the end, so an interrupted run leaves what was there. The same seed gives the same files.
    """
    for what, number, least in (
        ("repetitions", num_repetitions, 1),
        ("resamples", num_resamples, 100),
        ("seed", seed, 0),
    ):
        if number < least:
            raise UserError(f"{what} must be {least} or more, not {number}")
    progress = progress or SilentProgress()
    known, fresh, nulls = (
        ((*quality_worlds(), *family_worlds()), (*speed_worlds(), *tail_worlds(), *serial_worlds())),
        (fresh_quality_worlds(), (*fresh_speed_worlds(), *fresh_tail_worlds(), *fresh_serial_worlds())),
        null_worlds(),
    )
    size = {"num": num_repetitions, "num_resamples": num_resamples, "seed": seed}
    total = num_repetitions * (sum(len(worlds) for worlds in (*known, *fresh)) + len(nulls) + len(look_worlds()))
    with progress.track(total, "repetitions") as advance:
        tallies = [
            [
                *(calibrate_quality(world, **size, advance=advance) for world in quality),
                *(calibrate_speed(world, **size, advance=advance) for world in speed),
            ]
            for quality, speed in (known, fresh)
        ]
        null_tallies = [calibrate_null(world, **size, advance=advance) for world in nulls]
        look_tallies = [calibrate_looks(world, **size, advance=advance) for world in look_worlds()]
    found = rows([*tallies[0], *tallies[1]])
    out.mkdir(parents=True, exist_ok=True)
    parts = found[: len(tallies[0])], found[len(tallies[0]) :]
    text = as_markdown(parts, null_tallies, look_tallies, num_resamples=num_resamples, seed=seed, version=__version__)
    path = out / "calibration.md"
    path.write_text(text, encoding="utf-8")
    (out / "calibration.csv").write_text(as_csv(found, null_tallies, look_tallies), encoding="utf-8")
    return path
