"""Synthetic runs with several baselines, made of runs with one: the others are at other paces, and score otherwise."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.report_fixture import taking
from twotower_eval import store
from twotower_eval.records import Cell, DecoderSpec, GenerationRow, Score, SpeedSample, cell_id

QUICK = DecoderSpec(kind="prompt_lookup_of_mine", params={"temperature": 0.0})


def renamed(cell: Cell, name: str, decoder: DecoderSpec) -> Cell:
    """A baseline's cell as that of another decoder on the same model."""
    made = cell_id(cell.checkpoint, decoder, cell.workload)
    return dataclasses.replace(cell, id=made, decoder=decoder, baseline=name)


def with_baselines(
    path: Path,
    root: Path,
    others: Mapping[str, tuple[DecoderSpec, float]],
    *,
    first: str = "plain",
    wrong: Sequence[int] = (),
) -> Path:
    """A run like that in ``path`` with further baselines, each a decoder and its pace; ``first`` names its own one.

    The others are wrong on the documents of ``wrong``.
    """
    run = store.load(path)
    cells: list[Cell] = []
    rows: list[Any] = [*run.generations, *run.likelihoods, *run.scores, *run.speed]
    for cell in run.manifest.cells:
        if cell.arm != "baseline":
            cells.append(cell)
            continue
        cells.append(dataclasses.replace(cell, baseline=first))
        for name, (decoder, pace) in others.items():
            other = renamed(cell, name, decoder)
            cells.append(other)
            rows += [_of_other(row, other, pace, wrong) for row in rows if row.cell == cell.id]
    header = dataclasses.replace(run.manifest, cells=tuple(cells))
    with store.create(root, header) as writer:
        for row in rows:
            writer.append(row)
        writer.finish()
        return writer.path


def _of_other(row: Any, cell: Cell, pace: float, wrong: Sequence[int]) -> Any:
    if isinstance(row, SpeedSample):
        row = taking(row, pace)
    if isinstance(row, Score) and row.doc_id in wrong and row.value is not None and row.scored_by == "generation":
        row = dataclasses.replace(row, value=0.0)
    if isinstance(row, GenerationRow) and row.doc_id in wrong:
        row = dataclasses.replace(row, generation=dataclasses.replace(row.generation, text="0 wrong"))
    return dataclasses.replace(row, cell=cell.id)


def alone(path: Path, root: Path, name: str) -> Path:
    """A run with several baselines as if it had that one only, under no name."""
    run = store.load(path)
    kept = [cell for cell in run.manifest.cells if cell.arm == "candidate" or cell.baseline == name]
    cells = tuple(dataclasses.replace(cell, baseline=None) for cell in kept)
    there = {cell.id for cell in cells}
    with store.create(root, dataclasses.replace(run.manifest, cells=cells)) as writer:
        for row in [*run.generations, *run.likelihoods, *run.scores, *run.speed]:
            if row.cell in there:
                writer.append(row)
        writer.finish()
        return writer.path
