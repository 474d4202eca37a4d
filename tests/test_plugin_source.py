"""A plug-in's code is part of what was measured: its files are found, and other code is another cell."""

import dataclasses
import hashlib
import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_pair import write_pair
from twotower_eval import store
from twotower_eval.analyse.claims.match import cell_fits
from twotower_eval.analyse.compare import Runs
from twotower_eval.analyse.compare.points import point_key
from twotower_eval.engine.decoders import decoder_spec
from twotower_eval.engine.models import load_model
from twotower_eval.engine.plugin_source import NO_FILE, plugin_code
from twotower_eval.measure import speed, suites
from twotower_eval.plan import SpeedPlan
from twotower_eval.records import (
    Checkpoint,
    Claim,
    DecoderSpec,
    OperatingPoint,
    Workload,
    canonical_json,
    cell_id,
    to_json,
)
from twotower_eval.strict import from_json

PLUGIN = """
import dataclasses
from twotower_eval.engine.decoders.autoregressive import Autoregressive

@dataclasses.dataclass(frozen=True, kw_only=True)
class Params:
    temperature: float = 0.0

class Mine(Autoregressive):
    Params = Params
    VERSION = 1
"""


def package(root: Path, patch: pytest.MonkeyPatch, name: str, files: dict[str, str]) -> Path:
    """A package that can be imported, its modules forgotten afterwards."""
    patch.syspath_prepend(str(root))
    for file, text in files.items():
        path = root / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for module in [known for known in sys.modules if known.partition(".")[0] == name]:
        patch.delitem(sys.modules, module)
    return root / name


def named(found: Any) -> dict[str, str]:
    return {file.name: file.sha256 for file in found or ()}


def test_a_plugin_stands_for_its_file_and_what_it_imports_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {
        "__init__.py": "", "fast.py": "import json, torch\nfrom . import helper\nfrom plugone.sub import deep\nX = 1",
        "helper.py": "def late():\n    from plugone import hidden", "hidden.py": "import sys", "unused.py": "",
        "sub/__init__.py": "", "sub/deep.py": "from .. import helper\nfrom .missing import nothing",
    }  # fmt: skip
    files["sub/deep.py"] = "from .. import helper"
    folder = package(tmp_path, monkeypatch, "plugone", files)
    found = named(plugin_code("plugone.fast:X"))
    used = ["__init__.py", "fast.py", "helper.py", "hidden.py", "sub/__init__.py", "sub/deep.py"]
    assert list(found) == [f"plugone/{file}" for file in used]
    assert found["plugone/hidden.py"] == hashlib.sha256((folder / "hidden.py").read_bytes()).hexdigest()


def test_what_a_plugin_only_names_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that fails when it is imported ended in a traceback, though the plug-in can do without it."""
    fails = "raise RuntimeError('no such device')"
    package(tmp_path, monkeypatch, "plugheavy", {"__init__.py": fails, "ops.py": fails})
    files = {
        "__init__.py": "", "mine.py": "try:\n    import plugheavy.ops\nexcept Exception:\n    pass\nX = 1\n"
        "def late():\n    import plugfive.slow.deep, plugfive.bare.leaf, plugfive.mine.nothing",
        "slow/__init__.py": fails, "slow/deep.py": fails, "bare/leaf.py": fails,
    }  # fmt: skip
    package(tmp_path, monkeypatch, "plugfive", files)
    found = named(plugin_code("plugfive.mine:X"))
    assert list(found) == [f"plugfive/{file}" for file in sorted(files)]
    assert not {"plugheavy", "plugheavy.ops", "plugfive.slow", "plugfive.bare"} & set(sys.modules)


def test_a_single_file_takes_along_the_files_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lonely.py").write_text("import besides\nimport numpy\nX = 1")
    (tmp_path / "besides.py").write_text("")
    assert list(named(plugin_code("lonely:X"))) == ["besides.py", "lonely.py"]


def test_a_class_from_elsewhere_brings_its_own_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "origin_of_it.py").write_text("class Real: ...")
    (tmp_path / "handing_on.py").write_text("import origin_of_it as o\nReal = o.Real")
    assert list(named(plugin_code("handing_on:Real"))) == ["handing_on.py", "origin_of_it.py"]


def test_what_has_no_file_says_so_and_what_is_ours_has_a_version(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("out_of_thin_air")
    module.X = 1  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "out_of_thin_air", module)
    assert named(plugin_code("out_of_thin_air:X")) == {"out_of_thin_air": NO_FILE}
    assert plugin_code("twotower_eval.engine.decoders.autoregressive:Autoregressive") is None
    assert decoder_spec("block_diffusion").code is None
    with pytest.raises(ValueError, match="cannot import 'nowhere'"):
        plugin_code("nowhere:X")


def test_a_compiled_module_stands_for_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import py_compile

    monkeypatch.syspath_prepend(str(tmp_path))
    source = tmp_path / "hidden_source.py"
    source.write_text("X = 1")
    py_compile.compile(str(source), cfile=str(tmp_path / "hidden_source.pyc"))
    source.unlink()
    compiled = hashlib.sha256((tmp_path / "hidden_source.pyc").read_bytes()).hexdigest()
    assert named(plugin_code("hidden_source:X")) == {"hidden_source.pyc": compiled}


# Cells


def test_ids_and_files_of_shipped_decoders_are_what_they_were() -> None:
    spec = DecoderSpec(kind="block_diffusion", params={"block_size": 4})
    assert to_json(spec) == {"kind": "block_diffusion", "params": {"block_size": 4}, "version": 1}
    checkpoint = Checkpoint(name="m", family="f", source="s", digest="d", dtype="float32", devices=("cpu",))
    workload = Workload(kind="task", name="t", digest="e")
    assert cell_id(checkpoint, spec, workload) == "6b19e472a4bd"
    assert from_json(DecoderSpec, to_json(spec)) == spec


def test_other_code_is_another_decoder_and_a_claim_names_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = package(tmp_path, monkeypatch, "plugtwo", {"__init__.py": "", "mine.py": PLUGIN})
    before = decoder_spec("plugtwo.mine:Mine")
    assert from_json(DecoderSpec, json.loads(canonical_json(to_json(before)))) == before
    (folder / "mine.py").write_text(PLUGIN + "\n# faster\n")
    after = decoder_spec("plugtwo.mine:Mine")
    assert named(before.code).keys() == named(after.code).keys()
    run = timed(tmp_path, dataclasses.replace(SETTING, decoder="plugtwo.mine:Mine"))
    cell = next(cell for cell in run.manifest.cells if cell.arm == "candidate")
    old = dataclasses.replace(cell, decoder=before)
    assert cell.decoder == after
    assert point_key(cell) != point_key(old)
    assert cell_id(cell.checkpoint, before, cell.workload) != cell_id(cell.checkpoint, after, cell.workload)
    claim = Claim(
        name="c", quantity="speedup_time", subject="pair", baseline="context-tower", source="us", expected=1.0,
        margin=0.05, point=OperatingPoint(name="p", decoder=DecoderSpec(kind="plugtwo.mine:Mine")),
    )  # fmt: skip
    assert cell_fits(claim, cell)
    assert cell_fits(claim, old)


SETTING = SpeedPlan(tasks=("miniature_sort",), num_prompts=2, new_tokens=3, min_rounds=1, warmup_rounds=0, costs=False)


def timed(root: Path, plan: SpeedPlan, resume: Path | None = None) -> store.Run:
    pair = root / "pair" if (root / "pair").exists() else write_pair(root / "pair")
    requests = suites.build_requests(suites.resolve_tasks(plan.tasks))
    path = speed.run(dataclasses.replace(plan, model=str(pair)), requests, root=root / "results", resume=resume)
    return store.load(path)


def test_a_changed_plugin_goes_on_with_no_run_and_is_pooled_with_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"__init__.py": "", "mine.py": "from . import tricks\n" + PLUGIN, "tricks.py": "FAST = False"}
    folder = package(tmp_path, monkeypatch, "plugthree", files)
    plan = dataclasses.replace(SETTING, decoder="plugthree.mine:Mine", min_rounds=2)
    first = timed(tmp_path, plan)
    (folder / "tricks.py").write_text("FAST = True")
    with pytest.raises(ValueError, match=r"plugthree/tricks.py of the decoder plugthree.mine:Mine was changed"):
        timed(tmp_path, plan, resume=first.path)
    second = timed(tmp_path, plan)
    runs = Runs([first, second])
    assert len(runs.speed) == 2, "the runs are not pooled"
    names = {runs.name(point.candidate) for point in runs.speed}
    assert len(names) == 2
    assert all(", code " in name for name in names)


def test_a_plugin_family_is_part_of_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loader = "from twotower_eval.engine.models import checkpoint\n\ndef load(*args, **options):\n"
    loader += "    return checkpoint.load(*args, **options)\n"
    folder = package(tmp_path, monkeypatch, "plugfour", {"__init__.py": "", "family.py": loader})
    pair = write_pair(tmp_path / "pair")
    first = load_model(pair, family="plugfour.family:load").checkpoint
    (folder / "family.py").write_text(loader + "\n")
    second = load_model(pair, family="plugfour.family:load").checkpoint
    assert "plugfour/family.py" in {file.name for file in first.files}
    assert first.digest == second.digest
    assert first.identity != second.identity
    assert not any("plug" in file.name for file in load_model(pair).checkpoint.files)
