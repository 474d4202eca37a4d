"""``make bench``: the package's machinery beside what it replaces, all arms in one run (``python -m bench --help``)."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import bench


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benches that the arguments name; 0, or 2 with one line where the arguments do not fit."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line does; read when torch loads
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"{', '.join(bench.BENCHES)} [all that have what they need]")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads [1]")
    parser.add_argument("--rounds", type=int, help=f"timed rounds [{bench.ROUNDS}, with --full {bench.FULL_ROUNDS}]")
    parser.add_argument("--full", action="store_true", help="the sizes of the published tables, not small ones")
    parser.add_argument("--model", type=Path, help="scoring, generation: folder of a Hugging Face causal model")
    parser.add_argument("--data-dir", type=Path, help="scoring, generation: files made by twotower-eval data prepare")
    parser.add_argument(
        "--limit", type=int, help="scoring, generation: questions per task [12 and 16, with --full 200 and 64]"
    )
    given = vars(parser.parse_args(argv))
    try:
        bench.run(given.pop("names"), say=print, **given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
