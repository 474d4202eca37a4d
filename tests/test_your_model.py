"""docs/your-model.md: its commands run as they stand, offline, on tiny models in a cache made here."""

import re
from pathlib import Path

import pytest
from fake_hub import files_in, use_cache, write_cache
from hf_models import quantised, save_reading
from own_code import save_own, use_modules
from pages import DOCS, commands, run_commands

import twotower_eval as tt
from twotower_eval import cli, store
from twotower_eval.resources import data_path

PAGE = "your-model.md"
# The other sections are run by tests of their own.
RUN_HERE = ["Names", "Devices, dtypes and quantised models", "Two models of your own"]
HEADINGS = [*RUN_HERE, "Chat models", "Tasks", "Results that other tools read", "lm_eval's options, and ours"]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    write_cache(folder, "example/pair", files_in(data_path("miniature", "pair")))
    write_cache(folder, "example/llama", files_in(save_reading("llama", folder / "llama")))
    write_cache(folder, "example/llama", files_in(save_reading("gpt2", folder / "gpt2")), refs=("v2",))
    write_cache(folder, "example/llama-int8", files_in(quantised(folder / "llama", folder / "int8")))
    write_cache(folder, "example/own", files_in(save_own(folder / "own")))
    return folder


@pytest.fixture
def here(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    use_cache(monkeypatch, cache)
    use_modules(monkeypatch, cache / "modules")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def ref(cache: Path, name: str) -> str:
    return (cache / "models--example--llama" / "refs" / name).read_text()


def test_the_page_runs(here: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for section in RUN_HERE:
        run_commands(PAGE, here, monkeypatch, section)
    runs = [store.load(path) for path in reversed(store.find_runs(here / "results", "run"))]
    named = [{cell.arm: cell.checkpoint for cell in run.manifest.cells} for run in runs]
    assert [(one["candidate"].name, one["baseline"].name) for one in named] == [
        ("example/pair", "example/llama"),
        ("example/pair", "example/llama@v2"),
        ("example/llama@v2", "example/llama"),
        ("example/own", "example/llama"),
        ("example/llama", "example/llama"),
        ("example/llama-int8", "example/llama"),
        ("example/llama@v2", "example/llama"),
    ]
    assert (named[4]["baseline"].dtype, named[4]["candidate"].dtype) == ("bfloat16", "float32")
    assert str(named[5]["candidate"].quantisation) == "int8 weight-only by torchao"
    assert named[2]["candidate"].revision == named[1]["baseline"].revision == ref(cache, "v2")
    assert named[2]["baseline"].revision == named[0]["baseline"].revision == ref(cache, "main")
    assert named[2]["candidate"].identity == named[1]["baseline"].identity != named[2]["baseline"].identity
    assert [file.name for file in named[3]["candidate"].foreign_code][-1] == "parts_own.py"


def test_the_report_has_the_name_in_titles_and_the_commit_beside_the_checkpoint(here: Path, cache: Path) -> None:
    arms = ["--model", "example/llama", "--baseline", "example/llama@v2", "--decoder", "autoregressive"]
    assert cli.main(["run", *arms, "--tasks", "miniature_sort", "--limit", "2"]) == 0
    assert cli.main(["report"]) == 0
    (report,) = (here / "reports").glob("*/report.md")
    text = report.read_text(encoding="utf-8")
    assert text.startswith("# example/llama against example/llama@v2\n")
    before = text.partition("## Environment")[0]
    for commit in (ref(cache, "main"), ref(cache, "v2")):
        assert commit not in before
        assert f"| `{commit}` |" in text
    assert f"run --model example/llama --revision {ref(cache, 'main')} --baseline example/llama@v2" in text


def test_a_branch_that_moved_is_another_model_and_a_resumed_run_stays_at_its_commit(
    here: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = ["--tasks", "miniature_sort", "--limit", "2", "--decoder", "autoregressive"]
    assert cli.main(["run", "--model", "example/llama", "--baseline", "miniature", *plain]) == 0
    main = cache / "models--example--llama" / "refs" / "main"
    before = main.read_text()
    try:
        main.write_text(ref(cache, "v2"))
        (first,) = store.find_runs(here / "results", "run")
        assert cli.main(["run", "--resume", str(first), "--limit", "3"]) == 0
        assert {cell.checkpoint.revision for cell in store.load(first).manifest.cells} == {before, None}
        assert cli.main(["run", "--model", "example/llama", "--baseline", "miniature", *plain]) == 0
        capsys.readouterr()
        assert cli.main(["run", "--resume", str(first), "--revision", ref(cache, "v2")]) == 2
        assert f"revision was {before}, is {ref(cache, 'v2')}" in capsys.readouterr().err
    finally:
        main.write_text(before)
    second = store.find_runs(here / "results", "run")[0]
    ids = [{cell.id for cell in store.load(path).manifest.cells if cell.arm == "candidate"} for path in (first, second)]
    assert not ids[0] & ids[1]


def test_two_commits_of_one_name_have_them_in_their_names(here: Path, cache: Path) -> None:
    main, v2 = ref(cache, "main"), ref(cache, "v2")
    made = tt.evaluate(
        model="example/llama", revision=v2, baseline="example/llama", baseline_revision=main, decoder="autoregressive",
        tasks="miniature_sort", limit=1, progress=False,
    )  # fmt: skip
    names = {cell.arm: cell.checkpoint.name for cell in made.record.manifest.cells}
    assert names == {"baseline": f"example/llama@{main[:8]}", "candidate": f"example/llama@{v2[:8]}"}


def test_speed_with_several_baselines_of_the_hub(here: Path, cache: Path) -> None:
    few = ["--num-prompts", "1", "--min-rounds", "1", "--warmup-rounds", "0", "--probes", "0", "--new-tokens", "4"]
    arms = ["--model", "example/pair", "--baseline", "example/llama", "--baseline", "example/llama@v2"]
    assert cli.main(["speed", *arms, *few, "--tasks", "miniature_sort"]) == 0
    (path,) = store.find_runs(here / "results", "speed")
    cells = store.load(path).manifest.cells
    found = {cell.checkpoint.name: cell.checkpoint.revision for cell in cells if cell.arm == "baseline"}
    assert found == {"example/llama": ref(cache, "main"), "example/llama@v2": ref(cache, "v2")}
    assert {cell.baseline for cell in cells if cell.arm == "baseline"} == {"llama", "llama@v2"}


def test_the_static_cache_of_the_page_runs(here: Path, cache: Path) -> None:
    (own,) = [words for words in commands(PAGE, "Strong baselines") if "static_cache" in words]
    assert cli.main([*own[1:], "--warmup-rounds", "0"]) == 0
    (path,) = store.find_runs(here / "results", "speed")
    decoders = {cell.arm: cell.decoder for cell in store.load(path).manifest.cells}
    assert decoders["baseline"].params["max_cache_len"] == 256


def test_python_takes_the_same_names(here: Path, cache: Path) -> None:
    (code,) = re.findall(
        r"```python\n(.*?)```", (DOCS / PAGE).read_text(encoding="utf-8").partition("## Devices")[0], re.S
    )
    made: dict[str, tt.Model] = {}
    exec(code, made)
    checkpoint = made["model"].checkpoint
    assert (checkpoint.name, checkpoint.revision) == ("example/llama@v2", ref(cache, "v2"))
    home = cache / "models--example--llama" / "snapshots" / ref(cache, "main")
    by_path = tt.load_model(home).checkpoint
    assert (by_path.name, by_path.revision) == ("example/llama", ref(cache, "main"))
    assert by_path.identity == tt.load_model("example/llama").checkpoint.identity


def test_every_option_of_lm_eval_has_a_row_and_each_of_ours_exists() -> None:
    import argparse
    from typing import Any

    import typer
    from lm_eval._cli.run import Run

    theirs: Any = Run.create(argparse.ArgumentParser().add_subparsers())
    options = {name for one in theirs._parser._actions for name in one.option_strings if name.startswith("--")}
    section = (DOCS / PAGE).read_text(encoding="utf-8").split("## lm_eval's options, and ours")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("| `--")]
    assert {name for row in rows for name in re.findall(r"--\w+", row[0])} == options - {"--help"}

    found: Any = typer.main.get_command(cli.app)
    ours = {name for one in found.commands["run"].params for name in (*one.opts, *one.secondary_opts)}
    named = {name for row in rows for name in re.findall(r"`(--[\w-]+)", row[1])}
    assert named <= ours
    without = {name for row in rows if row[1].strip() == "–" for name in re.findall(r"--\w+", row[0])}
    hinted = {name for name in options if cli.options.hint_of(name)}
    assert (
        without - {"--samples"} <= hinted <= without | {"--model_args", "--config", "--use_cache", "--max_batch_size"}
    )
    for name in options - hinted - {"--help"}:  # these are taken as they are written there
        assert cli.options.dashes(name) in ours


def test_the_sections_are_in_order() -> None:
    titles = re.findall(r"^## (.*)", (DOCS / PAGE).read_text(encoding="utf-8"), re.M)
    assert titles[: len(HEADINGS)] == HEADINGS
