"""A run as Python objects: its folder, its records, and its rows as frames."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from twotower_eval import store
from twotower_eval.api.frames import Text, known_texts
from twotower_eval.errors import UserError
from twotower_eval.records import Check, RunManifest, verb_of

if TYPE_CHECKING:
    import pandas as pd

    from twotower_eval.api.summary import Table


class Run(os.PathLike[str]):
    """A run folder. Its files are read once, when something of them is first needed.

    ``record`` holds the journals as records. The frames have one row per journal row, with the run, the arm, the model,
    its dtype, the decoder and each of its parameters as columns. What does not exist is ``None`` or NaN.

    ``prompt`` and ``target`` are filled in where a file on this machine holds the text whose hash the run recorded: for
    the shipped tasks, and for ``data_dir`` where a prompt or target is a single field. They are ``None`` for prompts
    that lm-eval assembles, such as those with few-shot examples. The target of a multiple-choice question is the number
    of its option. ``answer`` is the generated text, ``None`` where log-likelihoods answered.

    >>> import twotower_eval as tt
    >>> run = tt.load_run("results/20261129T195736Z-run-d2db1f")  # doctest: +SKIP
    >>> run.scores.groupby(["task", "arm", "threshold"], dropna=False)["value"].mean()  # doctest: +SKIP
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    @cached_property
    def record(self) -> store.Run:
        """Everything in the folder, as records. UserError if it is no run folder or a file is broken."""
        return store.load(self.path)

    @cached_property
    def manifest(self) -> RunManifest:
        """The manifest: models, decoders, plan, versions, machine."""
        return store.read_manifest(self.path)

    @property
    def run_id(self) -> str:
        """The run's id, which is the name of its folder."""
        return self.manifest.run_id

    @property
    def complete(self) -> bool:
        """Whether the run is complete; ``resume=run`` continues one that is not."""
        return self.record.complete

    @cached_property
    def scores(self) -> pd.DataFrame:
        """A row for each document, metric and filter: ``value``, prompt, target and answer."""
        from twotower_eval.api import frames

        return frames.scores(self.record, self._texts)

    @cached_property
    def generations(self) -> pd.DataFrame:
        """A row for each generated answer, with its tokens and forwards counted."""
        from twotower_eval.api import frames

        return frames.generations(self.record, self._texts)

    @cached_property
    def likelihoods(self) -> pd.DataFrame:
        """A row for each log-likelihood: ``logprob_nats`` of an ``option`` behind a ``prompt``."""
        from twotower_eval.api import frames

        return frames.likelihoods(self.record, self._texts)

    @cached_property
    def speed(self) -> pd.DataFrame:
        """A row for each timed call: ``wall_s``, round, launch, and what the call did."""
        from twotower_eval.api import frames

        return frames.speed(self.record, self._texts)

    @cached_property
    def costs(self) -> pd.DataFrame:
        """A row for each part of decoding that was timed alone."""
        from twotower_eval.api import frames

        return frames.costs(self.record)

    @cached_property
    def checks(self) -> pd.DataFrame:
        """A row for each check of ``verify``."""
        from twotower_eval.api import frames

        return frames.checks(self.record)

    @property
    def tables(self) -> tuple[Table, ...]:
        """What it found, in a few small tables of text: scores, retention, speedups, rates."""
        from twotower_eval.api.comparison import Comparison

        return Comparison([self.record]).tables

    @property
    def check_lines(self) -> list[str]:
        """A line for each check of ``verify``, then a summary line."""
        return check_lines(self.record.checks, self.path)

    @cached_property
    def _texts(self) -> dict[str, Text]:
        return known_texts(self.record)

    def _repr_html_(self) -> str:
        """The run's name, whether it is complete, and mean scores by task where something was scored."""
        record = self.record
        counts = {"scores": len(record.scores), "generations": len(record.generations)}
        counts |= {"log-likelihoods": len(record.likelihoods), "timed calls": len(record.speed)}
        counts |= {"timed parts": len(record.costs), "checks": len(record.checks)}
        held = ", ".join(f"{num:,} {name}" for name, num in counts.items() if num)
        state = "complete" if record.complete else "not complete: resume it"
        title = f"<b>{escape(verb_of(record.manifest))}</b> <code>{escape(self.run_id)}</code> ({state})"
        return f"<p>{title}: {held or 'nothing yet'}</p>{self._means() if record.scores else ''}"

    def _means(self) -> str:
        shown = self.scores[self.scores["headline"]]
        point = list(shown.columns[1 : shown.columns.get_loc("task")])  # all that an operating point has
        means = shown.groupby([*point, "task"], dropna=False, sort=False)["value"].mean().unstack("task")
        return str(
            means.rename_axis(columns=None)
            .reset_index()
            .to_html(index=False, border=0, float_format="{:.3g}".format, na_rep="–")
        )


FLOORS = {"tokens_per_nfe"}  # checks whose value has to be above its limit; others must not be


def check_lines(checks: Sequence[Check], path: Path) -> list[str]:
    """A line for each check (outcome, name, value and limit, detail), then a summary line."""
    if not checks:
        raise UserError(f"{path} has no checks: only twotower-eval verify makes some")
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        value = "" if check.value is None else f"{check.value:.3g}"
        bound = "above" if check.name in FLOORS else "at most"
        limit = "" if check.limit is None else f" ({bound} {check.limit:g})"
        lines.append(f"{_outcome(check):11}  {check.name:{width}}  {value + limit:24}  {check.detail}")
    return [*lines, f"{path}: {_summary(checks)}"]


def _outcome(check: Check) -> str:
    """What is printed of a check: one without a limit is a figure that nothing is held against."""
    if check.outcome == "passed" and check.limit is None:
        return "measured"
    return check.outcome.replace("_", " ")


def _summary(checks: Sequence[Check]) -> str:
    failed = [check.name for check in checks if check.outcome == "failed"]
    num = Counter(map(_outcome, checks))
    rest = ", ".join(f"{num[outcome]} {outcome}" for outcome in ("passed", "measured", "not checked") if num[outcome])
    return f"FAILED: {', '.join(failed)}; {rest}" if failed else f"nothing failed: {rest}"
