"""Reports of one model alone: what it scored and how fast it is, and nothing of a comparison."""

import dataclasses
from pathlib import Path

import pandas as pd
import pytest
import report_fixture as made

from twotower_eval import store
from twotower_eval.analyse import report
from twotower_eval.analyse.report.text import significant
from twotower_eval.cli import main
from twotower_eval.records import (
    Cell,
    Check,
    Checkpoint,
    DecoderSpec,
    Override,
    RunManifest,
    SpeedSample,
    Workload,
    cell_id,
)

GPT = Checkpoint(
    name="gpt2", family="transformers", source="gpt2", digest="a" * 64, dtype="float32", devices=("cpu",)
)  # fmt: skip
COMPARING = (
    "against",
    "etention",
    "both arms",
    "candidate",
    "between the arms",
    "no baseline",
    "scored or timed completely yet",
    "power line",
    "Pareto",
    "Collapse",
    "Flips",
)


def of_gpt(path: Path, root: Path) -> Path:
    """The same run with the one model that it holds called gpt2."""
    run = store.load(path)
    cells = {cell.id: dataclasses.replace(cell, checkpoint=GPT) for cell in run.manifest.cells}
    ids = {old: cell_id(GPT, cell.decoder, cell.workload) for old, cell in cells.items()}
    header = dataclasses.replace(
        run.manifest, cells=tuple(dataclasses.replace(cell, id=ids[old]) for old, cell in cells.items())
    )
    rows = [*run.scores, *run.generations, *run.likelihoods, *run.speed]
    renamed = [dataclasses.replace(row, cell=ids[row.cell]) for row in rows]
    return made.write(root, header, renamed, complete=run.complete)


def scored(root: Path, **options) -> Path:
    tasks = ["arithmetic", "sorting"]
    return of_gpt(
        made.quality_run(root / "plain", decoders=(), num_docs=40, tasks=tasks, perplexity=False, **options), root
    )


def timed(root: Path, **options) -> Path:
    return of_gpt(made.speed_run(root / "plain", decoders=(), **options), root)


def verified(root: Path) -> Path:
    """What `verify` of the model writes; it calls what it checks the candidate."""
    workload, decoder = Workload(kind="checks", name="checks", digest="d"), DecoderSpec(kind="autoregressive")
    cell = Cell(id="c" * 12, arm="candidate", checkpoint=GPT, decoder=decoder, workload=workload)
    header: RunManifest = made.manifest("20261105T120000Z-verify-eeeeee", "verify", [cell])
    with store.create(root, header) as writer:
        writer.append(Check(cell=cell.id, name="finite_logits", outcome="passed", detail="all of them are finite"))
        writer.finish()
    return writer.path


def written(out: Path, *paths: Path, **options) -> str:
    return (report.write(paths, out, **options) / "report.md").read_text(encoding="utf-8")


def told(markdown: str) -> str:
    """The report up to its plans and packages, which hold whatever they hold."""
    return markdown.partition("## Environment")[0]


def test_one_model_alone_is_what_the_report_is_about(tmp_path: Path) -> None:
    """Its title was "gpt2 against gpt2" or "no candidate against gpt2", its headline that nothing had been scored."""
    markdown = written(tmp_path, scored(tmp_path), timed(tmp_path), verified(tmp_path))
    assert markdown.startswith(
        "# gpt2\n\n## One model alone\n\n**gpt2, autoregressive, measured alone: 80 documents of "
    )
    shown = told(markdown).replace("the model against itself", "").replace("| A/A null", "")
    assert [words for words in COMPARING if words in shown] == []
    titles = [line for line in markdown.splitlines() if line.startswith("## ")]
    assert [title.partition(":")[0] for title in titles] == [
        "## One model alone", "## Scores", "## Speed", "## Latency", "## Gates", "## Environment",
        "## How to reproduce it",
    ]  # fmt: skip
    values = [s.value for s in store.load(scored(tmp_path / "again")).scores if s.task == "arithmetic"]
    mean = sum(value for value in values if value is not None) / len(values)
    who = "gpt2, autoregressive(temperature=0.0)"
    assert f"| arithmetic | exact_match | generation | {who} | `{made.RUN_ID}` | 40 | {mean:.4f} [" in markdown
    assert "| A/A null, answer, batch 1 | passed | the model against itself " in markdown
    assert "| finite logits | passed |" in markdown
    assert "| gpt2, autoregressive | whole tasks | 80 | 0 (0.0 %) |" in markdown
    assert "| gpt2 | alone and checked | transformers |" in markdown


def test_its_speed_is_useful_tokens_over_seconds(tmp_path: Path) -> None:
    path = timed(tmp_path, num_rounds=6, num_calls=8)
    markdown = written(tmp_path, path, csv=True)
    samples = [s for s in store.load(path).speed if s.replica == 0 and s.phase == "measure"]
    rate = sum(p.num_tokens for s in samples for p in s.prompts) / sum(s.wall_s for s in samples)
    row = pd.read_csv(tmp_path / path.name / "tables" / "speed_alone.csv").iloc[0]
    assert row["tokens_per_s"] == pytest.approx(rate)
    assert row["tokens_per_s_low"] < rate < row["tokens_per_s_high"]
    assert row["model_num_tokens"] == sum(p.num_tokens for s in samples for p in s.prompts)
    assert f"measured alone: {significant(rate)} [" in markdown
    assert "useful tokens per second on the answer workload, batch 1.**" in markdown
    assert "| gpt2, autoregressive | answer: four tasks | 1 | 6 x 8 |" in markdown
    assert "## Scores" not in markdown
    assert [words for words in ("etention", "candidate", "both arms") if words in told(markdown)] == []


def test_a_speed_of_its_own_is_invalid_where_its_null_is_off(tmp_path: Path) -> None:
    def slow_copy(row):
        copied = isinstance(row, SpeedSample) and row.replica == 1
        return dataclasses.replace(row, wall_s=1.1 * row.wall_s) if copied else row

    markdown = written(tmp_path, timed(tmp_path, edit=slow_copy))
    assert "useful tokens per second (INVALID timing, see below) on the answer workload" in markdown
    assert "INVALID: the baseline timed against itself is off by more than 2 %" in markdown
    assert "| A/A null, answer, batch 1 | **FAILED** |" in markdown


def test_its_scores_are_tables_too(tmp_path: Path) -> None:
    path = scored(tmp_path)
    report.write([path], tmp_path, csv=True)
    tables = tmp_path / path.name / "tables"
    assert sorted(file.name for file in tables.iterdir()) == [
        "checkpoints.csv",
        "degenerate_outputs_alone.csv",
        "gates.csv",
        "scores_alone.csv",
    ]
    rows = pd.read_csv(tables / "scores_alone.csv").set_index(["task", "metric"])
    values = [s.value for s in store.load(path).scores if s.task == "sorting"]
    row = rows.loc["sorting", "exact_match"]
    assert row["score"] == pytest.approx(sum(values) / len(values))
    assert row["score_low"] < row["score"] < row["score_high"]
    assert (row["num_documents"], row["scored_by"], row["outputs"]) == (40, "generation", "whole_tasks")


def test_before_anything_is_scored_that_is_what_is_said(tmp_path: Path) -> None:
    markdown = written(tmp_path, scored(tmp_path, complete=False, edit=lambda row: None))
    assert markdown.startswith("# gpt2\n")
    assert "INCOMPLETE" in markdown
    assert "**Nothing has been scored or timed completely yet, so there is nothing to quote.**" in markdown
    assert "## Scores\n\nNothing has been scored yet." in markdown
    some = scored(tmp_path / "some", complete=False, edit=lambda row: row if row.doc_id < 7 else None)
    shown = written(tmp_path / "some", some)
    assert "measured alone: 14 documents of 2 tasks scored" in shown
    assert "completely yet" not in shown


def test_a_model_that_was_checked_only(tmp_path: Path) -> None:
    markdown = written(tmp_path, verified(tmp_path))
    assert markdown.startswith("# gpt2\n\n## One model alone\n\n**gpt2: checked by `verify`, see the gates; ")
    assert "completely yet" not in markdown
    assert "against" not in told(markdown)


def test_what_a_task_asks_and_what_was_cut_is_told_of_a_model_alone(tmp_path: Path) -> None:
    run = store.load(scored(tmp_path / "plain"))
    asks = Override(task="sorting", setting="temperature", asked=0.7, done=0.0, option="temperature")
    header = dataclasses.replace(run.manifest, overrides=(asks,))
    with store.create(tmp_path, header) as writer:
        for row in (*run.scores, *run.generations):
            writer.append(row)
        for cell in run.manifest.cells:
            cut = 3 if cell.workload.name == "sorting" else 0
            writer.event("truncated", cell=cell.id, task=cell.workload.name, num_requests=40, num_truncated=cut)
        writer.finish()
    markdown = written(tmp_path, writer.path)
    said = "- sorting asks for temperature: 0.7, done with 0: --temperature overrides it."
    assert said in markdown.partition("## Scores")[0]
    assert "| whole prompts | **FAILED** | sorting, the model: 3 of 40 prompts were longer than " in markdown
    assert " candidate" not in told(markdown)


def test_two_autoregressive_models_are_compared(tmp_path: Path) -> None:
    run = store.load(made.quality_run(tmp_path / "pair", decoders=(), num_docs=40, tasks=["sorting"], perplexity=False))
    [own] = run.manifest.cells
    other = dataclasses.replace(own, id="b" * 12, arm="candidate", checkpoint=GPT)
    header = dataclasses.replace(run.manifest, cells=(own, other))
    rows = [*run.scores, *run.generations]
    path = made.write(tmp_path, header, [*rows, *(dataclasses.replace(row, cell=other.id) for row in rows)])
    markdown = written(tmp_path, path)
    assert markdown.startswith("# gpt2 against pair (context tower)\n\n## Verdict")
    assert "**gpt2 decoding with autoregressive keeps 100.0 % [" in markdown


def test_a_model_alone_beside_a_comparison_keeps_its_own_figures(tmp_path: Path) -> None:
    both = made.quality_run(tmp_path, num_docs=40)
    markdown = written(tmp_path, both, timed(tmp_path))
    assert markdown.startswith("# pair against pair (context tower); gpt2 alone\n")
    assert "**gpt2, autoregressive, measured alone: " in markdown
    assert "Nothing has been timed completely" not in markdown
    assert "| gpt2, autoregressive | answer: four tasks | 1 |" in markdown


def test_a_claim_about_a_model_alone_is_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    claims = tmp_path / "own.toml"
    claims.write_text(
        """title = "Ours"
[[point]]
name = "p"
decoder = { kind = "autoregressive", temperature = 0.0 }
batch_size = 1
num_devices = 1
workload = "answer"
[[claim]]
name = "kept"
quantity = "retention"
subject = "gpt2"
baseline = "another"
point = "p"
scope = ["arithmetic"]
expected = 0.9
source = "a test"
""",
        encoding="utf-8",
    )
    path = scored(tmp_path)
    assert main(["claims", "check", str(claims), str(path)]) == 6
    assert "NOT MEASURED  kept  gpt2 was measured only without a baseline; `" in capsys.readouterr().out
    claims.write_text(claims.read_text(encoding="utf-8").replace('"arithmetic"', '"miniature_srot"'), encoding="utf-8")
    assert main(["claims", "check", str(claims), str(path)]) == 6
    assert "without a baseline; miniature_srot: did you mean miniature_sort?; `" in capsys.readouterr().out
    markdown = written(tmp_path, path, claims=str(claims))
    assert "**NOT MEASURED**: claim kept, " in markdown
    assert "**gpt2, autoregressive, measured alone: 80 documents of " in markdown
