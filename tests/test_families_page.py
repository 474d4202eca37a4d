"""The page on families: its table names them all, and its walk from an empty folder to a report runs as it stands."""

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
from pages import DOCS, run_commands, write_files
from safetensors.torch import load_file, save_file

import twotower_eval as tt
from twotower_eval import cli, store
from twotower_eval.engine.decoders import DECODERS
from twotower_eval.engine.models import FAMILIES, MODEL_TYPES
from twotower_eval.errors import UserError

PAGE = "families.md"
OTHERS = {"nemotron_h", "transformers", "openai"}  # pairs, causal models, and models behind a server


def rows() -> list[list[str]]:
    """The cells of the table."""
    text = (DOCS / PAGE).read_text(encoding="utf-8").partition("\n## ")[0]
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[1:]]


def named(cell: str) -> set[str]:
    return set(re.findall(r"`(\w[\w-]*)`", cell))


def test_every_family_has_a_row() -> None:
    first = {name for row in rows() for name in named(row[0])}
    assert first >= FAMILIES.keys() - OTHERS
    said = {name for row in rows() for name in named(row[1])}
    assert MODEL_TYPES.keys() <= said
    for row in rows():
        for family in named(row[0]) - set(MODEL_TYPES.values()) - {"a2d_bd3lm", "radd"}:
            assert family in named(row[1])
        assert named(row[4]) <= DECODERS.keys() or named(row[0]) - FAMILIES.keys()
        assert bool(named(row[4])) == bool(named(row[0]))


@pytest.fixture
def walked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    assert write_files(PAGE, tmp_path) == ["own_blocks.py", "make_own.py"]
    run_commands(PAGE, tmp_path, monkeypatch)
    return tmp_path


def newest(folder: Path, verb: Any) -> store.Run:
    return store.load(store.find_runs(folder / "results", verb)[0])


def test_the_walk(walked: Path, capsys: Any) -> None:
    checks = {check.name: check.outcome for check in newest(walked, "verify").checks}
    assert {name for name, outcome in checks.items() if outcome == "passed"} >= {
        "finite_logits",
        "batch_equals_single",
        "golden_logits",
    }
    assert "failed" not in checks.values()
    scored = newest(walked, "run")
    assert scored.complete
    of = {cell.decoder.params.get("threshold"): cell for cell in scored.manifest.cells if cell.arm == "candidate"}
    assert of.keys() == {0.5, 0.9}
    assert "own_blocks.py" in {file.name for file in of[0.5].checkpoint.files}
    kinds = {score.scored_by for score in scored.scores if scored.cells[score.cell].arm == "candidate"}
    assert "denoiser_left_to_right" in kinds
    (report,) = (walked / "reports").glob("*/report.md")
    assert "# own against miniature" in report.read_text(encoding="utf-8")

    tensors = load_file(walked / "own" / "golden.safetensors")
    tensors["logits"][0, 5, 7] += 0.01
    save_file(tensors, walked / "own" / "golden.safetensors")
    assert cli.main(["verify", "own", "--family", "own_blocks:load", "--golden", "own"]) == 5
    assert "not block at 4" in capsys.readouterr().out


METHOD = "    def denoise(self, block_BK, context, t_B=None):\n        return "
WRONG = {  # added to the class, and what is said of it
    "    denoise = property()\n": "its OwnBlocks lacks denoise",
    "    mask_token_id = property(lambda self: None, lambda self, given: None)\n": "a denoiser and no mask_token_id",
    METHOD + "torch.zeros(1, 2)\n": r"its denoise are of shape \(1, 2\), not logits of shape \(2, 2, 112\)",
    METHOD + "torch.ones(len(block_BK), 2, 112) * context.past.num_columns\n": "in a batch and alone lie 1 apart",
    METHOD + "torch.full((len(block_BK), 2, 112), torch.nan)\n": "its denoise hold NaN or infinite values",
}


@pytest.mark.parametrize("wrong", WRONG, ids=range(len(WRONG)))
def test_a_denoiser_is_tried_as_it_is_loaded(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_files(PAGE, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    runpy.run_path("make_own.py")
    file = tmp_path / "own_blocks.py"
    text = file.read_text(encoding="utf-8").replace('behind it."""\n', f'behind it."""\n\n{wrong}', 1)
    file.write_text(f"import torch\n{text}", encoding="utf-8")
    with pytest.raises(UserError, match=WRONG[wrong]):
        tt.load_model("own", family="own_blocks:load")
