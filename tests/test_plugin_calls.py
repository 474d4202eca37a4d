"""A plug-in that raises ends in one line that says where, and the run goes on from what was there."""

import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_pair import write_pair

from tests import raising_decoders
from twotower_eval import cli, store
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.measure import harness
from twotower_eval.measure.harness.answers import CellJournal
from twotower_eval.plan import RunPlan
from twotower_eval.plugin_calls import TRACEBACK_VARIABLE, PluginError

KIND = "tests.raising_decoders:Raising"
TASK = "miniature_sort"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


def line_of(text: str) -> str:
    """``raising_decoders.py:41``, where this text stands."""
    lines = Path(raising_decoders.__file__).read_text(encoding="utf-8").split("\n")
    (number,) = [number for number, line in enumerate(lines, 1) if text in line]
    return f"raising_decoders.py:{number} in "


SAID = {
    "Params": ("its Params raised KeyError: 'width' at ", line_of('KeyError("width")')),
    "__init__": ("its __init__ raised Odd at ", line_of("raise Odd")),
    "generate": ("its generate raised ZeroDivisionError: no steps left at ", line_of("raise ZeroDivisionError")),
    "model": ("its generate raised ", line_of("self.model.prefill(torch.zeros")),
}
OPTIONS = {"run": ["--limit", "3", "--batch-size", "1", "--max-new-tokens", "4"]}
OPTIONS["speed"] = [
    "--num-prompts",
    "3",
    "--min-rounds",
    "1",
    "--warmup-rounds",
    "0",
    "--new-tokens",
    "4",
    "--no-costs",
]
OPTIONS["speed"] += ["--probes", "0"]


def command(verb: str, pair: Path, out: Path, kind: str = KIND) -> list[str]:
    own = ["--model", str(pair), "--tasks", TASK, "--decoder", kind, "--out", str(out)]
    return [verb, *own, *OPTIONS[verb]]


@pytest.mark.parametrize("where", SAID)
@pytest.mark.parametrize("verb", OPTIONS)
def test_whatever_a_plug_in_raises_is_one_line_that_says_where(
    pair: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, verb: str, where: str
) -> None:
    """It was a traceback of the harness."""
    monkeypatch.setenv(raising_decoders.WHERE, where)
    assert cli.main(command(verb, pair, tmp_path)) == 2
    (line,) = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert line.startswith(f"error: decoder {KIND}: {SAID[where][0]}")
    assert SAID[where][1] in line
    assert line.endswith(f"; set {TRACEBACK_VARIABLE}=1 for the whole traceback")
    if where == "model":
        assert ", in its call of " in line
    if where == "generate":
        assert ", called at " in line
    monkeypatch.setenv(TRACEBACK_VARIABLE, "1")
    with pytest.raises(PluginError) as raised:
        cli.main(command(verb, pair, tmp_path))
    assert raised.value.__cause__ is not None
    assert raised.value.__cause__.__traceback__ is not None


@pytest.mark.parametrize("verb", OPTIONS)
def test_rows_before_it_stay_and_the_run_resumes(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setenv(raising_decoders.WHERE, "generate")
    assert cli.main(command(verb, pair, tmp_path)) == 2
    (folder,) = store.find_runs(tmp_path, verb)
    run = store.load(folder)
    assert not run.complete
    before = list(run.generations)
    assert before or verb == "speed"
    monkeypatch.delenv(raising_decoders.WHERE)
    assert cli.main([verb, "--resume", str(folder)]) == 0
    assert store.load(folder).complete
    assert store.load(folder).generations[: len(before)] == before


def test_one_that_cannot_be_called_so_says_what_it_was_called(
    pair: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli.main(command("run", pair, tmp_path, "tests.raising_decoders:TakesNothing")) == 2
    assert "TakesNothing' is called as generate(prompts, max_new_tokens=…" in capsys.readouterr().err


def test_a_module_that_raises_as_it_is_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "broken_plug_in.py").write_text("from broken_beside import x\n", encoding="utf-8")
    (tmp_path / "broken_beside.py").write_text("x = {}['a']\n", encoding="utf-8")
    (tmp_path / "misspelt_plug_in.py").write_text("def\n", encoding="utf-8")
    with pytest.raises(PluginError, match=r"its module raised KeyError: 'a' at .*broken_(beside|plug_in)\.py:1 in"):
        make_decoder(None, "broken_plug_in:Mine")
    with pytest.raises(PluginError, match=r"its module raised SyntaxError: .* at .*misspelt_plug_in\.py:1"):
        make_decoder(None, "misspelt_plug_in:Mine")
    assert "broken_plug_in" not in sys.modules


def test_what_our_own_code_raises_is_no_fault_of_the_plug_ins(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal that cannot be written is told of by a decoder's call, and stays what it is."""

    def add(self: Any, row: Any) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(CellJournal, "add", add)
    plan = RunPlan(model=str(pair), tasks=(TASK,), decoder=KIND, limit=2, max_new_tokens=4, batch_size=1)
    with pytest.raises(RuntimeError, match="a bug"):
        harness.run(plan, root=tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr("twotower_eval.engine.decoders.autoregressive.Autoregressive.generate", add)
    with pytest.raises(TypeError):
        harness.run(plan, root=tmp_path / "own")


GIVEN_BACK = {
    "Short": "3 generations for 4 prompts",
    "Swapped": "in the place of prompt ",
    "Twice": "on_finish received its answer twice",
    "Lying": "on_finish received another answer than generate returned",
}


def run_of(pair: Path, kind: str, root: Path, **options: Any) -> store.Run:
    plan = RunPlan(model=str(pair), tasks=(TASK,), decoder=f"tests.raising_decoders:{kind}", limit=5, **options)
    return store.load(harness.run(plan, root=root))


@pytest.mark.parametrize("kind", GIVEN_BACK)
def test_what_generate_gives_back_has_to_be_what_was_journalled(pair: Path, tmp_path: Path, kind: str) -> None:
    """It was not looked at: an answer less, or another one, went unseen."""
    with pytest.raises(ValueError, match=GIVEN_BACK[kind]):
        run_of(pair, kind, tmp_path, max_new_tokens=4)


def test_a_decoder_that_tells_nothing_as_it_finishes_is_journalled_all_the_same(pair: Path, tmp_path: Path) -> None:
    run = run_of(pair, "Silent", tmp_path, max_new_tokens=4)
    assert run.complete
    assert len(run.generations) == 10


def test_a_decoder_that_keeps_its_parameters_to_itself_may_draw_its_tokens(pair: Path, tmp_path: Path) -> None:
    """It was refused as one whose temperature is 0: its cell names the temperature that it was made with."""
    run = run_of(pair, "Unnamed", tmp_path, max_new_tokens=4, temperature=0.7)
    assert {cell.decoder.params.get("temperature") for cell in run.manifest.cells} == {0.7}
