"""Reference outputs of whole families are replayed exactly, and whatever is changed in them is noticed."""

import copy
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pages import DOCS

from twotower_eval import cli
from twotower_eval.measure.verify.checks import CheckResult
from twotower_eval.measure.verify.golden import Golden, golden_results, load_golden
from twotower_eval.measure.verify.replays import NUMBERS, REPLAYS

GOLDEN = os.environ.get("TWOTOWER_EVAL_GOLDEN")
FOLDERS = sorted([*REPLAYS, "e2d2_sharekv"])  # one of each family, and both forms of E2D2
pytestmark = pytest.mark.skipif(not GOLDEN, reason="needs the reference outputs (TWOTOWER_EVAL_GOLDEN)")


def _golden(family: str) -> Golden:
    folder = Path(GOLDEN or "", "families", family.removesuffix("_absorbing_text"))
    if not folder.is_dir():
        pytest.skip(f"there are no reference outputs of {family}")
    return load_golden(folder, None, "cpu")  # type: ignore[arg-type]  # its own checkpoint is loaded


def _outcomes(golden: Golden) -> dict[str, str]:
    return {result.name: result.outcome for result in golden_results(golden)}


def _exact_runs(results: Sequence[CheckResult]) -> str | None:
    """Runs given again exactly, as docs/families.md states them; None without runs."""
    (runs,) = [result for result in results if result.name == "golden_runs"]
    found = re.match(r"(\d+) of (\d+) runs", runs.detail)
    return f"{found[1]}/{found[2]}" if found else None


@pytest.mark.parametrize("family", FOLDERS)
def test_a_familys_reference_outputs_are_replayed_exactly(family: str) -> None:
    results = list(golden_results(_golden(family)))
    outcomes = {result.name: result.outcome for result in results}
    stated = dict(re.findall(r"(\w+) (\d+/\d+)", (DOCS / "families.md").read_text(encoding="utf-8")))
    assert "failed" not in outcomes.values()
    assert _exact_runs(results) == stated.get(family.removesuffix("_absorbing_text"))
    held = ("golden_likelihoods",) if family in NUMBERS else ("golden_logits", "golden_runs")
    assert {outcomes[name] for name in held} == {"passed"}


def _one_run(golden: Golden) -> tuple[Golden, dict[str, Any]]:
    """The same with nothing but the shortest run that is to be compared."""
    meta = copy.deepcopy(dict(golden.meta))
    able = [run for run in meta.get("runs", ()) if run.get("compare", True) and not run.get("tie_order_dependent")]
    if not able or not isinstance(able[0].get("final"), list):
        pytest.skip("its runs are tensors of recorded draws")
    run = min(able, key=lambda run: len(str(run["final"])) * run["nfe"]["model_calls"])
    for name in ("forwards", "likelihood"):
        meta.pop(name, None)
    return Golden(golden.model, golden.tensors, {**meta, "runs": [run]}), run


def _token(run: dict[str, Any], place: int) -> None:
    final = run["final"][0] if isinstance(run["final"][0], list) else run["final"]
    final[place] = 1 if final[place] == 0 else final[place] - 1


def _counts(run: dict[str, Any]) -> None:
    run["nfe"] = {name: num + 1 for name, num in run["nfe"].items()}
    if "calls" in run:
        run["calls"] = [*run["calls"], run["calls"][-1]]
    if "window_lengths" in run:
        run["window_lengths"].append(run["window_lengths"][-1])


CHANGES: dict[str, tuple[str, Callable[[dict[str, Any]], None]]] = {
    "a token": ("golden_runs", lambda run: _token(run, -2)),
    "the number of calls": ("golden_counts", _counts),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("family", sorted(REPLAYS))
def test_a_changed_run_is_noticed(family: str, change: str) -> None:
    golden, run = _one_run(_golden(family))
    result, make = CHANGES[change]
    make(run)
    assert _outcomes(golden)[result] == "failed"


@pytest.mark.parametrize("family", sorted(REPLAYS))
def test_changed_logits_are_noticed(family: str) -> None:
    golden = _golden(family)
    named = [entry["logits"] for entry in golden.meta.get("forwards", ()) if "logits" in entry]
    if not named or named[0] not in golden.tensors:
        pytest.skip("its forwards are named otherwise")
    name = named[0]
    changed = golden.tensors[name].clone()
    changed.view(-1)[changed.numel() // 2] += 0.01
    meta = {**golden.meta, "runs": [], "likelihood": []}
    other = Golden(golden.model, {**golden.tensors, name: changed}, meta)
    assert _outcomes(other)["golden_logits"] == "failed"
    assert torch.equal(golden.tensors[name].isnan(), changed.isnan())


@pytest.mark.parametrize(
    ("family", "tensor", "result"),
    [
        ("mdlm", "sample.ddpm.final", "golden_runs"),
        ("mdlm", "fwd.0.logits", "golden_logits"),
        ("mdlm", "bound.continuous.nlls", "golden_likelihoods"),
        ("radd", "sample.tweedie_direct.final", "golden_runs"),
        ("radd", "fwd.0.logits", "golden_logits"),
        ("radd", "bound.k_DCE.loss_per_sequence", "golden_likelihoods"),
        ("e2d2", "sample.posterior.final", "golden_runs"),
        ("e2d2", "sample.unaligned_offset.trajectory", "golden_counts"),
        ("e2d2", "stage.prefill_hidden", "golden_logits"),
        ("e2d2", "bound.3.log_probs", "golden_logits"),
        ("e2d2", "bound.1.nlls", "golden_likelihoods"),
        ("e2d2_sharekv", "sample.nocache.final", "golden_runs"),
        ("e2d2_sharekv", "sample.posterior_first_hitting.trajectory", "golden_counts"),
        ("e2d2_sharekv", "stage.block1.step1.logits", "golden_logits"),
        ("e2d2_sharekv", "bound.2.xt", "golden_counts"),
        ("diffusion_gemma", "fwd.0.logits_next_canvas", "golden_logits"),
        ("diffusion_gemma", "gen.default.processed_logits_per_step", "golden_logits"),
        ("diffusion_gemma", "gen.early_stop.sequences", "golden_runs"),
        ("diffusion_gemma", "gen.left_padded.sequences", "golden_runs"),
        ("diffusion_gemma", "gen.batch2.argmax_canvas_per_step", "golden_counts"),
        ("diffusion_gemma", "gen.batch2.canvas_per_step", "golden_counts"),
        ("diffusion_gemma", "gen.eos.tokens_per_forward", "golden_counts"),
        ("md4", "case0.linear.cont.loss_diff", "golden_likelihoods"),
        ("d3pm_absorbing_text", "T8.case1.step1.term", "golden_likelihoods"),
    ],
)
def test_changed_tensors_are_noticed(family: str, tensor: str, result: str) -> None:
    golden = _golden(family)
    changed = golden.tensors[tensor].clone()
    changed.view(-1)[-min(2, changed.numel())] += 1
    lists = {"sampler_runs": "sample", "generate_runs": "gen"}
    runs = {
        name: [run for run in golden.meta.get(name, ()) if tensor.startswith(f"{prefix}.{run['name']}.")]
        for name, prefix in lists.items()
    }
    other = Golden(golden.model, {**golden.tensors, tensor: changed}, {**golden.meta, **runs})
    assert _outcomes(other)[result] == "failed"


@pytest.mark.parametrize(
    ("family", "count"),
    [
        ("diffusion_gemma", "encoder_calls"),
        ("diffusion_gemma", "decoder_calls"),
        ("mdlm", "backbone_calls_total"),
        ("radd", "rows_evaluated"),
        ("e2d2", "encoder_calls"),
        ("e2d2_sharekv", "reported_nfe"),
        ("e2d2_sharekv", "masks_left_in_output"),
        ("e2d2", "steps"),
    ],
)
def test_changed_counts_of_samplers_are_noticed(family: str, count: str) -> None:
    golden = _golden(family)
    runs = "sampler_runs" if "sampler_runs" in golden.meta else "generate_runs"
    run = dict(golden.meta[runs][0])
    run[count] += 1
    assert _outcomes(Golden(golden.model, golden.tensors, {**golden.meta, runs: [run]}))["golden_counts"] == "failed"


def test_every_number_of_calls_and_every_place_of_a_canvas_is_held_to_its_own() -> None:
    """Kinds of calls, the prompt's part of a canvas, what stands behind a stop, and masks left before a call."""

    def kinds(run: dict[str, Any]) -> Iterator[Callable[[dict[str, Any]], None]]:
        for kind in run["nfe"]:
            yield lambda own, kind=kind: own["nfe"].update({kind: own["nfe"][kind] + 1})  # type: ignore[misc]
        for place in (0, len(run["final"]) - 1):
            yield lambda own, place=place: own["final"].__setitem__(place, own["final"][place] ^ 1)  # type: ignore[misc]
        if "masks_left_before_call" in run:
            yield lambda own: own["masks_left_before_call"].append(1)

    for family in ("llada", "dream", "sdar", "a2d_qwen3", "llada2_moe"):
        golden, shortest = _one_run(_golden(family))
        others = [run for run in _golden(family).meta["runs"] if run["name"].endswith("_stop")]
        for run in (shortest, *others):
            for change in kinds(run):
                changed = copy.deepcopy(dict(run))
                change(changed)
                other = Golden(golden.model, golden.tensors, {**golden.meta, "runs": [changed]})
                assert "failed" in _outcomes(other).values(), (family, run["name"], changed)


def test_a_small_change_of_a_small_number_is_noticed() -> None:
    """Each number has its own tolerance; it was that of the largest number of its tensor."""
    golden = _golden("llada")
    changed = golden.tensors["plain_7.logits"].clone()
    flat = changed.view(-1)
    flat[int(flat.abs().argmin())] += 2e-4
    tensors = {**golden.tensors, "plain_7.logits": changed}
    other = Golden(golden.model, tensors, {**golden.meta, "runs": [], "likelihood": []})
    assert _outcomes(other)["golden_logits"] == "failed"


@pytest.mark.parametrize("family", NUMBERS)
@pytest.mark.parametrize("named", [True, False])
def test_numbers_without_a_checkpoint_are_verified(family: str, named: bool, tmp_path: Path, capsys: Any) -> None:
    """Their folder is no model, and need not be named as one."""
    folder = tmp_path / "numbers"
    shutil.copytree(Path(GOLDEN or "", "families", family.removesuffix("_absorbing_text")), folder)
    argv = ["verify", *([str(folder)] if named else []), "--golden", str(folder), "--out", str(tmp_path / "results")]
    assert cli.main(argv) == 0
    assert "golden_likelihoods" in capsys.readouterr().out
    meta = json.loads((folder / "golden.json").read_text())
    entry = meta["cases"][-1]
    key = "loss" if "loss" in entry else "elbo"
    entry[key] += 0.01
    (folder / "golden.json").chmod(0o644)
    (folder / "golden.json").write_text(json.dumps(meta))
    assert cli.main(argv) == 5
