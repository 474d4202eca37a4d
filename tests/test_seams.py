"""What users add: sections are added to the shipped ones, installed packages' names are found, families are held
against what a model must give; each mistake is one line."""

import re
import shutil
import textwrap
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import report_fixture as made
from tiny_pair import write_pair

from twotower_eval import cli, names
from twotower_eval.analyse import report
from twotower_eval.engine.decoders import decoder_class, decoder_spec
from twotower_eval.engine.decoders.autoregressive import Autoregressive
from twotower_eval.engine.models import family_calls, family_of, load_model
from twotower_eval.engine.models.arms import load_arms
from twotower_eval.plugin_calls import PluginError

SECTION = """
from twotower_eval.analyse.report import Section

def mine(runs):
    return Section(title="Mine", markdown=f"{len(runs)} runs", files={"mine.txt": b"x"})

def late(runs):
    return {}["speed"]

def text(runs):
    return "## Mine"

def nothing(runs):
    pass

def page(runs):
    return Section(title="Mine", markdown="x", files={"report.md": b"x"})

def words(runs):
    return Section(title="Mine", markdown="x", files={"mine.txt": "x"})

def two_lines(runs):
    return Section(title="Mine\\n# own", markdown="x")

NUMBER = 3
"""


@pytest.fixture
def sections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "sections_of_mine.py").write_text(SECTION)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "sections_of_mine"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("runs")
    return [made.quality_run(root, num_docs=20), made.speed_run(root, num_rounds=3, num_calls=3)]


def titles(folder: Path) -> list[str]:
    return re.findall("^## (.*)", (folder / "report.md").read_text(encoding="utf-8"), re.M)


def test_a_section_of_ones_own_is_added_and_replaces_none(runs: list[Path], tmp_path: Path, sections: str) -> None:
    """It stood alone: whoever added one lost all the others."""
    shipped = titles(report.write(runs, tmp_path / "shipped"))
    added = titles(report.write(runs, tmp_path / "added", sections=[f"{sections}:mine"]))
    assert added == [*shipped[:-2], "Mine", *shipped[-2:]]
    chosen = report.write(runs, tmp_path / "chosen", sections=["gates", f"{sections}:mine", "headline"])
    assert titles(chosen) == [shipped[shipped.index("Gates")], "Mine", shipped[0]]
    assert (chosen / "mine.txt").read_bytes() == b"x"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "late",
            r"error: section S:late: its late raised KeyError: 'speed' at \S*mine\.py:8 in late; set ",
        ),
        ("text", "error: section S:text: it returned a str, not a Section; return Section(title=…"),
        ("nothing", "error: section S:nothing: it returned nothing, not a Section; return"),
        ("page", "error: section S:page: its files hold 'report.md', which is a file of the report's own"),
        ("words", "error: section S:words: its files hold 'mine.txt', which is not a name with bytes"),
        ("two_lines", "error: section S:two_lines: its title is empty or longer than a line"),
        ("NUMBER", "error: section S:NUMBER is no function render(runs) that returns a Section"),
    ],
)
def test_a_section_that_is_none_is_one_line(
    runs: list[Path], tmp_path: Path, sections: str, capsys: Any, name: str, words: str
) -> None:
    command = ["report", *map(str, runs), "--out", str(tmp_path / "out"), "--section", f"{sections}:{name}"]
    assert cli.main(command) == 2
    said = capsys.readouterr().err.replace(sections + ":", "S:")
    pattern = words if "\\" in words else re.escape(words)
    assert re.match(pattern, said), said
    assert said.count("\n") == 1


# --- names that installed packages register ------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Install packages with these entry points, by metadata that importlib reads from a folder on Python's path."""

    def install(package: str, group: str, *entries: str) -> None:
        folder = tmp_path / f"{package}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text("\n".join([f"[{group}]", *entries]) + "\n")
        names.registered.cache_clear()

    monkeypatch.syspath_prepend(str(tmp_path))
    yield install
    names.registered.cache_clear()


PLACE = "twotower_eval.engine.decoders.autoregressive:Autoregressive"


def test_registered_names_are_used_like_short_ones(
    runs: list[Path], tmp_path: Path, sections: str, installed: Any
) -> None:
    installed("mine", "twotower_eval.decoders", f"one_by_one = {PLACE}")
    installed("other", "twotower_eval.sections", f"own = {sections}:mine")
    assert decoder_class("one_by_one") is Autoregressive
    spec = decoder_spec("one_by_one", temperature=0.5)
    assert (spec.kind, spec.params["temperature"], spec.version) == ("one_by_one", 0.5, Autoregressive.VERSION)
    assert "Mine" in titles(report.write(runs, tmp_path / "out", sections=["own"]))
    with pytest.raises(ValueError, match="decoder 'one_by_on' is unknown; did you mean one_by_one"):
        decoder_class("one_by_on")
    with pytest.raises(ValueError, match=r"choose from autoregressive, .*, one_by_one, or name your own as"):
        decoder_class("zzz")


def test_packages_are_not_asked_about_shipped_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distributions", lambda **_: pytest.fail("packages were asked"))
    decoder_spec("autoregressive")


@pytest.mark.parametrize("verb", ["run", "speed", "verify", "report"])
def test_the_help_lists_what_packages_register(installed: Any, capsys: Any, verb: str) -> None:
    assert cli.main([verb, "--help"]) == 0
    assert "installed packages" not in capsys.readouterr().out
    installed("one", "twotower_eval.decoders", f"one_by_one = {PLACE}")
    installed("two", "twotower_eval.sections", "own = elsewhere:render")
    installed("three", "twotower_eval.families", "bigram = elsewhere:load", "trigram = elsewhere:more")
    assert cli.main([verb, "--help"]) == 0
    listed = re.findall("^From installed packages, as (.*)", capsys.readouterr().out, re.M)
    families, decoders = "model family: bigram, trigram", "decoder: one_by_one"
    expected = {"verify": [families], "report": ["report section: own"]}
    assert listed == expected.get(verb, [families, decoders])


def test_two_of_one_name_are_an_error(installed: Any) -> None:
    installed("one", "twotower_eval.decoders", f"fast = {PLACE}")
    installed("two", "twotower_eval.decoders", f"fast = {PLACE}")
    assert decoder_class("fast") is Autoregressive, "one and the same thing"
    installed("three", "twotower_eval.decoders", "fast = elsewhere:Fast")
    with pytest.raises(ValueError, match=f"both elsewhere:Fast and {PLACE} as decoder 'fast': uninstall one"):
        decoder_class("fast")


def test_shipped_names_win(installed: Any) -> None:
    installed("one", "twotower_eval.decoders", "autoregressive = elsewhere:Fast", f"fine = {PLACE}")
    assert decoder_class("autoregressive") is Autoregressive
    with pytest.raises(ValueError, match="registers elsewhere:Fast as decoder 'autoregressive', which is shipped"):
        decoder_class("fine")


def test_a_registered_family_reads_folders_of_its_type(tmp_path: Path, installed: Any) -> None:
    """Unless transformers knows that type as well."""
    (tmp_path / "config.json").write_text('{"model_type": "bigram"}')
    assert family_of(tmp_path) == "transformers"
    installed("one", "twotower_eval.families", "bigram = elsewhere:load", "llama = elsewhere:load")
    assert family_of(tmp_path) == "bigram"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match=r"both read model_type 'llama': choose with --family"):
        family_of(tmp_path)
    assert family_of(write_pair(tmp_path / "pair")) == "nemotron_h"


def test_a_module_beside_the_command_says_how_to_find_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lies_here.py").write_text("class Mine: ...")
    with pytest.raises(ValueError, match=r"lies_here\.py lies in this folder: set PYTHONPATH=\. to have"):
        decoder_class("lies_here:Mine")


# --- families ------------------------------------------------------------------------------------------------------

FAMILY = """
from twotower_eval.engine.models import checkpoint

def load(folder, *, devices, dtype, tower=None):
    model = checkpoint.load(folder, devices=devices, dtype=dtype, tower="context")
    {change}
    return model
"""
CHANGES = {
    "whole": ("pass", ""),
    "raises": ("raise KeyError('rope')", r"its load raised KeyError: 'rope' at \S*family_raises\.py:6 in load; set "),
    "nothing": ("model = None", "its load returned nothing, not a model; docs/family.md has a whole example"),
    "bare": (
        "model = object()",
        "its object lacks checkpoint, context_digest, vocab_size, .*, prefill, extend, next_logits, context_logits; ",
    ),
    "half": ("model.has_denoiser = True", "its ContextTower lacks denoise; docs"),
    "kind": ("model.eos_token_ids = 2", "eos_token_ids of its ContextTower is a int, not a tuple or list; docs"),
    "shape": (
        "model.next_logits = lambda context: context.last_hidden_BH",
        r"its next_logits are of shape \(2, 16\), not logits of shape \(2, 112\)",
    ),
    "zero": (
        "model.extend = lambda context, ids, lengths=None: context",
        r"next_logits behind its extend and its context_logits of the same tokens lie [\d.]+ apart, more than [\d.]+",
    ),
    "calls": (
        "model.__class__ = type('Own', (type(model),), {'prefill': lambda self, *_: {}['states']})",
        r"its <lambda> raised KeyError: 'states' at \S*family_calls\.py:6 in load\.<locals>\.<lambda>; set",
    ),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.mark.parametrize("name", CHANGES)
def test_a_family_that_lacks_something_is_one_line(
    tmp_path: Path, pair: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    change, words = CHANGES[name]
    (tmp_path / f"family_{name}.py").write_text(FAMILY.format(change=change))
    monkeypatch.syspath_prepend(str(tmp_path))
    if name == "whole":
        model = load_model(pair, family="family_whole:load")
        assert model.checkpoint.family == "family_whole:load"
        assert model.checkpoint.digest == load_model(pair, tower="context").checkpoint.digest
        return
    with pytest.raises(ValueError, match=f"family family_{name}:load: {words}") as raised:
        load_model(pair, family=f"family_{name}:load")
    assert "\n" not in str(raised.value)


def test_a_load_that_cannot_be_called_so(tmp_path: Path, pair: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "family_of_one.py").write_text("def load(folder): ...")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match=r"one:load is called as load\(folder, devices=…, dtype=…, tower=…\)"):
        load_model(pair, family="family_of_one:load")
    with pytest.raises(ValueError, match="model family 'nemotron' is unknown; did you mean nemotron_h"):
        load_model(pair, family="nemotron")


LATER = """
import os
from twotower_eval.engine.models import autoregressive, checkpoint

class Own(autoregressive.ContextTower):
    def extend(self, context, ids_BK, lengths_B=None):
        if context.lengths[0] > 9:  # which no trial reaches
            return {}["cache"]
        return super().extend(context, ids_BK, lengths_B)

def load(folder, *, devices, dtype, tower=None):
    model = checkpoint.load(folder, devices=devices, dtype=dtype, tower="context")
    model.__class__ = Own
    return model
"""


def test_what_a_family_raises_in_a_run_is_one_line_that_says_where(
    tmp_path: Path, pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Its own decoder is ours: nobody would be told whose fault it is."""
    (tmp_path / "family_in_runs.py").write_text(LATER)
    monkeypatch.syspath_prepend(str(tmp_path))
    command = ["--model", str(pair), "--family", "family_in_runs:load", "--decoder", "autoregressive"]
    command += ["--tasks", "miniature_sort", "--out", str(tmp_path / "out")]
    runs = {
        "run": ["--limit", "2", "--batch-size", "2", "--max-new-tokens", "4"],
        "speed": ["--num-prompts", "2", "--batch-sizes", "2", "--new-tokens", "4", "--min-rounds", "1", "--no-costs"],
    }
    for verb, options in runs.items():
        capsys.readouterr()
        assert cli.main([verb, *command, *options]) == 2
        (line,) = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
        said = (
            r"error: family family_in_runs:load: its extend raised KeyError: 'cache' at \S*family_in_runs\.py:8 in Own"
        )
        assert re.match(said, line), line


def test_what_a_family_raises_that_config_json_chose_is_its_fault_too(
    tmp_path: Path, pair: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, installed: Any
) -> None:
    """No plan names it: it was a bug of this project's, with a traceback."""
    (tmp_path / "family_of_type.py").write_text(
        LATER.replace("checkpoint.load(folder", "checkpoint.load(folder / 'inner'")
    )
    folder = tmp_path / "own"
    shutil.copytree(pair, folder / "inner")
    (folder / "config.json").write_text('{"model_type": "own_hybrid"}')
    installed("own", "twotower_eval.families", "own_hybrid = family_of_type:load")
    assert family_of(folder) == "own_hybrid"
    command = ["run", "--model", str(folder), "--decoder", "autoregressive", "--tasks", "miniature_sort"]
    command += ["--limit", "2", "--batch-size", "2", "--max-new-tokens", "4", "--out", str(tmp_path / "out")]
    assert cli.main(command) == 2
    (line,) = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert re.match(
        r"error: family own_hybrid: its extend raised KeyError: 'cache' at \S*family_of_type\.py:8 in", line
    )


def test_one_folder_read_by_two_families_is_two_models(
    tmp_path: Path, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "family_twice.py").write_text(FAMILY.format(change="pass"))
    monkeypatch.syspath_prepend(str(tmp_path))
    options: dict[str, Any] = {"dtype": "float32", "devices": ("cpu",)}
    baseline, candidate = load_arms(pair, pair, family="family_twice:load", **options)
    assert (baseline.checkpoint.family, candidate.checkpoint.family) == ("nemotron_h", "family_twice:load")
    baseline, candidate = load_arms(pair, pair, baseline_family="nemotron_h", **options)
    assert baseline is candidate
    tower, candidate = load_arms(pair, None, family="family_twice:load", **options)
    assert tower is candidate


def test_what_a_family_raises_later_is_told_and_what_others_raise_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = """
        def step(number):
            return 1 / number

        def load(folder): ...
    """
    (tmp_path / "family_later.py").write_text(textwrap.dedent(code))
    monkeypatch.syspath_prepend(str(tmp_path))
    import family_later  # type: ignore[import-not-found]

    told = r"family family_later:load: its step raised ZeroDivisionError: .* at \S*family_later\.py:3 in step; set "
    with pytest.raises(PluginError, match=told), family_calls((tmp_path, "family_later:load"), (None, None)):
        family_later.step(0)
    with pytest.raises(KeyError), family_calls((tmp_path, "family_later:load"), (tmp_path, "nemotron_h")):
        _ = {}["here"]
