"""A large run opened and reported: seconds of processor time and peak memory, in a process of its own.

``PYTHONPATH=tests python -m bench.opening open|report FOLDER`` measures one of the two on a run folder.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import report_fixture as made

import bench
from twotower_eval import store
from twotower_eval.records import Cell, Generation, GenerationRow, Score, Workload, sha256_text, to_json
from twotower_eval.store.journal import close_run

NUM_ROWS, FULL_ROWS = 20_000, 1_000_000
TASKS = ("sums", "sorting")
RUN_ID = "20261101T120000Z-run-cccccc"


def run(*, rounds: int, full: bool, say: bench.Say, num_rows: int | None = None) -> bench.Findings:
    """Open a run of so many rows, and make its report."""
    num_rows = num_rows or (FULL_ROWS if full else NUM_ROWS)
    say(f"a run of {num_rows:,} rows, opened and reported by a fresh process each, {rounds} times; the least counts\n")
    with tempfile.TemporaryDirectory() as folder:
        path = write_run(Path(folder), num_rows)
        size = sum(file.stat().st_size for file in path.iterdir())
        found = {what: [measure(what, path) for _ in range(rounds)] for what in ("open", "report")}
    least = {what: min(several, key=lambda one: one["cpu_s"]) for what, several in found.items()}
    rows = tuple((what, f"{one['cpu_s']:.1f}", f"{one['peak_bytes'] / 1e9:.2f}") for what, one in least.items())
    header = (f"{num_rows:,} rows, {size / 1e6:,.0f} MB", "processor s", "peak GB")
    return bench.Findings(header=header, rows=rows, summary={"num_rows": num_rows, "num_bytes": size, **least})


def measure(what: str, path: Path) -> dict[str, Any]:
    """Processor seconds and peak bytes of ``open`` or ``report`` in a fresh process, imports included."""
    found_at = os.pathsep.join(filter(None, (str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": found_at}
    command = [sys.executable, "-m", "bench.opening", what, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{what} failed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_run(root: Path, num_rows: int) -> Path:
    """A finished run with so many rows, of a baseline and four candidates over two tasks; the same bytes every time."""
    decoders = [made.block_diffusion(16, None, threshold) for threshold in (0.7, 0.8, 0.9, 0.95)]
    cells = []
    for task in TASKS:
        work = Workload(kind="task", name=task, digest=sha256_text(task), max_new_tokens=64)
        cells.append(made.make_cell("baseline", made.AUTOREGRESSIVE, work))
        cells += [made.make_cell("candidate", decoder, work) for decoder in decoders]
    with store.create(root, made.manifest(RUN_ID, "run", cells)) as writer:
        path = writer.path
    num_docs = num_rows // (2 * len(cells))  # each with a generation and a score
    for name, rows in (("generations", _generations(cells, num_docs)), ("scores", _scores(cells, num_docs))):
        with open(path / f"{name}.jsonl", "w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(to_json(row), ensure_ascii=False, separators=(",", ":")) + "\n")
    close_run(path, store.FILES)
    return path


def _is_right(at: int, doc_id: int) -> bool:
    return doc_id * 7919 % 1009 % 100 < 80 - 3 * (at % 5)


def _generations(cells: list[Cell], num_docs: int) -> Iterator[GenerationRow]:
    for at, cell in enumerate(cells):
        for doc_id in range(num_docs):
            num = 12 + doc_id % 8
            answer = f"so {doc_id + (0 if _is_right(at, doc_id) else 1)}"
            generation = Generation(
                prompt_id=f"{cell.workload.name}/{doc_id}/0/0",
                token_ids=tuple((doc_id * 31 + 7 * place) % 90 + 5 for place in range(num)),
                text=f"{doc_id % 97} and {doc_id % 89} and {doc_id % 83} make {answer}",
                finish="eos",
                num_prompt_tokens=12,
                num_tokens=num,
                num_discarded_tokens=0 if cell.arm == "baseline" else 3,
                num_context_forwards=num if cell.arm == "baseline" else 2,
                num_denoiser_forwards=0 if cell.arm == "baseline" else num // 2,
                num_forced_commits=None if cell.arm == "baseline" else 2,
            )
            yield GenerationRow(
                cell=cell.id,
                task=cell.workload.name,
                doc_id=doc_id,
                request_index=0,
                repeat=0,
                prompt_sha256=sha256_text(f"{cell.workload.name} {doc_id}"),
                generation=generation,
            )


def _scores(cells: list[Cell], num_docs: int) -> Iterator[Score]:
    for at, cell in enumerate(cells):
        task = cell.workload.name
        for doc_id in range(num_docs):
            yield Score(
                cell=cell.id,
                task=task,
                doc_id=doc_id,
                cluster_id=f"{task}/{doc_id}",
                doc_sha256=sha256_text(f"document {task} {doc_id}"),
                prompt_sha256=sha256_text(f"{task} {doc_id}"),
                target_sha256=sha256_text(f"target {task} {doc_id}"),
                metric="exact_match",
                filter="none",
                higher_is_better=True,
                headline=True,
                scored_by="generation",
                value=float(_is_right(at, doc_id)),
                aggregation="mean",
                main=True,
            )


def main(what: str, folder: str) -> None:
    """Print the figures of one of the two."""
    start_s = time.process_time()
    if what == "open":
        store.load(Path(folder))
    else:
        from twotower_eval.analyse import report

        with tempfile.TemporaryDirectory() as out:
            report.write([Path(folder)], Path(out))
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"cpu_s": time.process_time() - start_s, "peak_bytes": peak_bytes}))


if __name__ == "__main__":
    main(*sys.argv[1:])
