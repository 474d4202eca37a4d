"""What `twotower-eval list` shows: everything that can be named, installed and one's own included, without torch."""

import dataclasses
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from test_registered import install, site
from test_task_sources import write_task

from twotower_eval import cli
from twotower_eval.analyse.compare.points import long_name
from twotower_eval.api import listing
from twotower_eval.api.listing import Listed, listed, parameters
from twotower_eval.engine.decoders import DECODERS, decoder_class, decoder_spec
from twotower_eval.engine.models import FAMILIES
from twotower_eval.errors import UserError
from twotower_eval.measure.suites import lm_tasks, suite_names

__all__ = ["site"]  # a fixture


def by_name(found: list[Listed]) -> dict[str, Listed]:
    return {one.name: one for one in found}


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of lm-eval's own tasks: the whole index takes seconds."""
    from lm_eval.tasks import TaskManager

    folder = lm_tasks.roots()[1]
    paths = [str(folder / name) for name in ("arc", "gsm8k", "mmlu/default")]
    index = TaskManager(include_path=paths, include_defaults=False).task_index
    monkeypatch.setattr(lm_tasks, "stock_index", lambda: index)


def test_decoders_show_their_own_parameters_and_defaults() -> None:
    """Read off their source, they are those of the class."""
    found = by_name(listed("decoders"))
    assert {name for name, one in found.items() if one.source == "shipped"} == set(DECODERS)
    for name in DECODERS:
        own = {field.name: field.default for field in dataclasses.fields(decoder_class(name).Params)}
        assert found[name].facts["parameters"] == own


def test_each_shipped_decoder_and_family_has_a_sentence(capsys: Any) -> None:
    assert set(listing.DECODER_SENTENCES) == set(DECODERS)
    assert set(listing.FAMILY_SENTENCES) == set(FAMILIES)
    for kind in ("decoders", "families"):
        for one in listed(kind):
            assert one.source != "shipped" or str(one.facts["description"]).endswith(".")
    assert cli.main(["list", "decoders", "sdar"]) == 0
    assert "block after block behind an exact cache" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(set(DECODERS) - {"endpoint", "reference"}))
def test_what_differs_from_a_decoders_defaults_is_named_in_its_point(name: str) -> None:
    """Ways of published samplers that change answers are off unless asked for, and then named."""
    fields = dataclasses.fields(decoder_class(name).Params)
    switches = [field for field in fields if isinstance(field.default, bool) and field.name != "trace"]
    if not switches:
        pytest.skip("it has no switches")
    usual = decoder_spec(name)
    for field in switches:
        changed = dataclasses.replace(usual, params={**usual.params, field.name: not field.default})
        assert long_name(changed) != long_name(usual)
        assert (f"{field.name.replace('_', ' ')} true" in long_name(changed)) == (not field.default)
    off = {"commit_mask", "extra_step", "eos_of_prompt", "drop_crossing", "zero_at_end", "whole_batch", "half"}
    off |= {"all_steps", "drawn_times", "lost_cache"}
    assert not any(field.default for field in switches if field.name in off)


@pytest.mark.parametrize(
    ("kind", "params"),
    [
        ("sdar", {"top_p": 2.0}),
        ("sdar", {"top_p": 0.0}),
        ("sdar", {"threshold": -0.5}),
        ("dream", {"eps": 7.0}),
        ("dream", {"eps": 0.0}),
        ("dream", {"top_p": 1.5}),
        ("low_confidence", {"threshold": 0.5, "factor": 1.0}),
        ("fast_dllm_v1", {"cache": "dual", "cfg_scale": 1.0}),
        ("ancestral", {"eps": 1.0}),
        ("radd", {"top_p": 0.5, "top_k": 3}),
        ("llada2", {"eos_of_prompt": True}),
    ],
)
def test_a_decoders_wrong_parameters_are_one_line(kind: str, params: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(params))) as raised:
        decoder_spec(kind, **params)
    assert "\n" not in str(raised.value)


def test_parameters_of_a_plug_in_are_read_without_importing_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plug").mkdir()
    (tmp_path / "plug" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (tmp_path / "plug" / "base.py").write_text(
        "class Shared:\n    width: int = 4\n    count: ClassVar[int] = 1\n\n\nclass Decoder:\n    Params = Shared\n"
    )
    (tmp_path / "plug" / "own.py").write_text(
        "from plug.base import Decoder, Shared\n\n\nclass Own(Decoder):\n    class Params(Shared):\n"
        "        order: str\n        rate: float = 1 / 3\n\n\nclass Heir(Decoder[int]):\n    pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert parameters("plug.own:Own") == {"width": 4, "order": "required", "rate": "1 / 3"}
    assert parameters("plug.own:Heir") == {"width": 4}
    assert parameters("plug.nothing:Own") == parameters("nothing_at_all:Own") == {}
    assert "plug" not in sys.modules


def test_what_installed_packages_register_is_listed(site: Path) -> None:
    place = "twotower_eval.engine.decoders.autoregressive:MockAR"
    install(
        site, "extra", f"[twotower_eval.decoders]\nmocked = {place}\n[twotower_eval.families]\nown = pkg.mod:load\n"
    )
    assert by_name(listed("decoders"))["mocked"] == Listed(
        name="mocked", source="installed package", facts={"parameters": {"temperature": 0.0}, "description": ""}
    )
    assert by_name(listed("families"))["own"].facts == {"place": "pkg.mod:load", "description": ""}


@pytest.mark.parametrize("what", ["suites", "decoders", "families", "claims", "sections"])
def test_what_is_light_loads_neither_torch_nor_lm_eval(what: str) -> None:
    code = f"import sys; from twotower_eval import cli; cli.main(['list', '{what}'])"
    code += "; print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout
    assert not {"torch", "lm_eval", "transformers", "matplotlib", "typer.rich_utils"} & set(done.stderr.split())


def test_suites_claims_and_families_are_all_there() -> None:
    assert set(by_name(listed("suites"))) == set(suite_names())
    assert "mgsm" in by_name(listed("suites"))["paper-11"].facts["tasks"]  # type: ignore[operator]
    assert set(by_name(listed("claims"))) == {"miniature", "nemotron-labs-twotower"}
    assert {one.name for one in listed("families") if one.source == "shipped"} == set(FAMILIES)


def test_tasks_say_where_they_are_from_and_whether_their_data_is_here(
    tmp_path: Path, stock: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_task(tmp_path / "own", "sums", "tag: mine")
    write_task(tmp_path / "own", "arc_easy")
    (tmp_path / "own" / "arc_easy.jsonl").unlink()
    (tmp_path / "data" / "gsm8k").mkdir(parents=True)
    said: list[str] = []
    paths = {"include_path": [str(tmp_path / "own")], "data_dir": tmp_path / "data"}
    found = by_name(listed("tasks", say=said.append, **paths))  # type: ignore[arg-type]
    assert len(said) == 1
    assert "lm-eval's index" in said[0]
    facts = {name: (one.source, *one.facts.values()) for name, one in found.items()}
    assert facts["sums"] == ("include path", "task", "here")
    assert facts["mine"] == ("include path", "tag", "")
    assert facts["arc_easy"] == ("include path", "task", "not here")
    assert facts["arc_challenge"] == ("lm-eval", "task", "not here")
    assert facts["gsm8k_cot"] == ("lm-eval", "task", "here")
    assert facts["mmlu"] == ("lm-eval", "group", "")
    assert facts["miniature_sort"] == ("shipped", "task", "here")

    hub = tmp_path / "hub"
    (hub / "datasets--cais--mmlu").mkdir(parents=True)
    monkeypatch.setenv("HF_HUB_CACHE", str(hub))
    found = by_name(listed("tasks"))
    assert found["mmlu_anatomy"].facts["data"] == "in the hub's cache"
    assert found["gsm8k"].facts["data"] == "not here"


def test_a_pattern_is_a_wildcard_or_a_part(stock: None, capsys: Any) -> None:
    assert [one.name for one in listed("tasks", "arc_e*")] == ["arc_easy"]
    assert [one.name for one in listed("suites", "11")] == ["paper-11"]
    for arguments, message in (
        (["list", "suites", "miniatur?x"], "none of the suites matches 'miniatur?x' (did you mean 'miniature'?)"),
        (["list", "suite"], "there is no list of 'suite' (did you mean 'suites'?)"),
        (["list", "tasks", "--include-path", "nowhere"], "--include-path nowhere: no such folder"),
        (["list", "tasks", "--data-dir", "nowhere"], "--data-dir nowhere: no such folder"),
    ):
        assert cli.main(arguments) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


def test_lines_in_a_pipe_json_and_a_table_on_a_terminal(capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.main(["list", "decoders", "block*"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.split("\t")[:2] == ["block_diffusion", "shipped"]
    assert "block_size=16" in line
    assert cli.main(["list", "--json"]) == 0
    everything = json.loads(capsys.readouterr().out)
    assert set(everything) == {"suites", "decoders", "families", "claims", "sections"}
    [plain] = [one for one in everything["decoders"] if one["name"] == "autoregressive"]
    assert plain["parameters"] == {"temperature": 0.0}
    assert cli.main(["list"]) == 0
    assert "claims\tminiature\tshipped" in capsys.readouterr().out

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stdout", screen)
    assert cli.main(["list", "families"]) == 0
    assert "nemotron_h" in screen.getvalue()
    assert "─" in screen.getvalue()
