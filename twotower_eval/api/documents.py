"""What documents ask and what their answers are held against, where that can be known from files on this machine.

A run records hashes of prompts and targets and not their texts. The shipped tasks, and JSONL files under the run's own
``data_dir``, are looked through for texts with those very hashes: what is found is what was asked, never a guess.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from twotower_eval.errors import UserError
from twotower_eval.plan import data_path
from twotower_eval.records import canonical_json
from twotower_eval.store import Run
from twotower_eval.store.journal import read_objects


@dataclass(frozen=True, kw_only=True)
class Text:
    """A text that some hash of a run is of; with ``option`` where the hash is of a context and what may follow it."""

    text: str
    option: str | None = None


def known_texts(run: Run) -> dict[str, Text]:
    """By sha256 the texts of the run's prompts and targets, those that files here hold.

    Prompts with examples before them, and any that lm-eval makes of several fields, are in no file and not found.
    """
    wanted = _recorded(run)
    found: dict[str, Text] = {}
    for file in _files(run):
        with contextlib.suppress(UserError):  # a file that is no JSONL of ours holds nothing that we know
            for _, row in read_objects(file):
                found |= {digest: text for digest, text in _texts(row) if digest in wanted}
    return found


def _recorded(run: Run) -> set[str]:
    found = {row.prompt_sha256 for rows in (run.generations, run.likelihoods) for row in rows}
    for score in run.scores:
        found |= {score.prompt_sha256, score.target_sha256}
    return found


def _files(run: Run) -> Iterator[Path]:
    """Files of the run's tasks: shipped ones, and those that ``data_dir`` has for them."""
    tasks = sorted({row.task for rows in (run.scores, run.generations, run.likelihoods) for row in rows})
    folder = run.manifest.plan.get("data_dir")
    for task in tasks:
        shipped = data_path("tasks", "miniature", f"{task}.jsonl")
        if shipped.is_file():
            yield shipped
        elif folder is not None:
            yield from sorted((Path(str(folder)) / task).glob("*.jsonl"))


def _texts(row: Mapping[str, object]) -> Iterator[tuple[str, Text]]:
    """Every text of a row by its hash, numbers as lm-eval writes them; and each text with each option behind it."""
    plain = [str(value) for value in row.values() if isinstance(value, str | int)]
    yield from ((_sha256(text), Text(text=text)) for text in plain)
    lists = [value for value in row.values() if isinstance(value, list) and all(isinstance(one, str) for one in value)]
    for text, options in product(plain, lists):
        digests = [_sha256(canonical_json([text, option])) for option in options]
        yield from zip(digests, (Text(text=text, option=option) for option in options), strict=True)
        yield _sha256("".join(digests)), Text(text=text)  # of all requests of a document together


def _sha256(text: str) -> str:
    # Half of a surrogate pair, which web text may hold, is hashed as lm-eval's own logs do.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
