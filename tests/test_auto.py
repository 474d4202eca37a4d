"""What ``auto`` becomes for devices, dtypes, decoders and batch sizes, by arm, and where it is said."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import save_reading
from safetensors.torch import load_file, save_file
from tiny_pair import write_pair

import twotower_eval as tt
from twotower_eval import cli, store
from twotower_eval.engine.models import choices
from twotower_eval.errors import UserError
from twotower_eval.measure.chosen import choose_batch_size, size_without_auto, without_auto
from twotower_eval.plan import RunPlan, SizingPlan, SpeedPlan, VerifyPlan, named_baselines
from twotower_eval.rules import chosen_line


@pytest.fixture
def half(tmp_path: Path) -> Path:
    """A Hugging Face checkpoint that is stored in bfloat16."""
    return in_dtype(save_reading("llama", tmp_path / "half"), "bfloat16")


def in_dtype(folder: Path, dtype: str) -> Path:
    """The folder with its tensors and its config in that dtype."""
    file, config = folder / "model.safetensors", folder / "config.json"
    tensors = {name: tensor.to(getattr(torch, dtype)) for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": dtype}))
    return folder


def has(monkeypatch: pytest.MonkeyPatch, *, cuda: bool = False, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


@pytest.mark.parametrize(
    ("cuda", "mps", "family", "device"),
    [
        (True, True, "nemotron_h", "cuda:0"),
        (False, True, "transformers", "mps"),
        (False, True, "nemotron_h", "cpu"),  # its router needs float64
        (False, False, "transformers", "cpu"),
    ],
)
def test_the_first_device_that_can_be_used(
    cuda: bool, mps: bool, family: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    has(monkeypatch, cuda=cuda, mps=mps)
    assert choices.choose_device([family]).value == device


@pytest.mark.parametrize("cls", [RunPlan, SpeedPlan])
def test_both_arms_get_one_device_and_each_its_checkpoint_s_dtype(
    cls: Any, half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = save_reading("gpt2", tmp_path / "full")
    plan = cls(model=str(half), baseline=str(full))
    here, chosen = without_auto(plan)
    assert (here.devices, here.dtype, here.baseline_dtype, here.baseline_device) == (("cpu",), "float32", None, None)
    assert {(one.setting, one.arm, one.reason) for one in chosen} == {
        ("device", None, "no accelerator"),
        ("dtype", "candidate", "slow on CPUs"),
        ("dtype", "baseline", "as stored"),
        ("decoder", None, "no denoiser"),
    }
    has(monkeypatch, cuda=True)
    there, _ = without_auto(plan)
    assert (there.devices, there.dtype, there.baseline_dtype) == (("cuda:0",), "bfloat16", "float32")
    assert without_auto(there) == (there, ())


def test_what_is_named_stays_and_each_arm_has_its_own(half: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, cuda=True)
    plan = RunPlan(model=str(half), dtype="float32", devices=("cpu",), baseline_dtype="auto", baseline_device="auto")
    found, chosen = without_auto(plan)
    assert (found.dtype, found.devices, found.baseline_dtype, found.baseline_device) == (
        "float32", ("cpu",), "bfloat16", "cuda:0",
    )  # fmt: skip
    assert {(one.setting, one.arm) for one in chosen} == {
        ("device", "baseline"),
        ("dtype", "baseline"),
        ("decoder", None),
    }


def test_each_of_several_baselines_has_its_own(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, cuda=True)
    full = str(save_reading("gpt2", tmp_path / "full"))
    plan = SpeedPlan(
        model=str(half), baselines=({"model": full}, {"model": str(half)}, {"model": full, "dtype": "float16"})
    )
    found, chosen = without_auto(plan)
    singles = named_baselines(found)
    assert [name for name, _ in singles] == ["full, float32", "half, bfloat16", "full, float16"]
    assert [single.baseline_dtype for _, single in singles] == ["float32", None, "float16"]
    assert {single.baseline_device for _, single in singles} == {None}
    assert [(one.arm, one.name, one.value) for one in chosen if one.setting == "dtype"] == [
        ("candidate", None, "bfloat16"),
        ("baseline", "full, float32", "float32"),
        ("baseline", "half, bfloat16", "bfloat16"),
    ]
    assert without_auto(found) == (found, ())


def test_a_config_s_dtype_comes_before_the_tensors_own(half: Path) -> None:
    assert choices.stored_dtype(half) == "bfloat16"
    config = json.loads((half / "config.json").read_text())
    for changed, dtype in (({"dtype": "float16"}, "float16"), ({"text_config": {"torch_dtype": "float32"}}, "float32")):
        rest = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
        (half / "config.json").write_text(json.dumps({**rest, **changed}))
        assert choices.stored_dtype(half) == dtype
    (half / "config.json").write_text(json.dumps(rest))
    assert choices.stored_dtype(half) == "bfloat16"


def test_the_model_of_load_model_may_be_auto(half: Path) -> None:
    loaded = tt.load_model(half, device="auto", dtype="auto")
    assert (loaded.checkpoint.dtype, loaded.checkpoint.devices) == ("float32", ("cpu",))
    assert tt.load_model(half, dtype="bfloat16").checkpoint.dtype == "bfloat16"


def test_auto_stands_for_one_device() -> None:
    with pytest.raises(UserError, match="auto stands for one device"):
        RunPlan(devices=("auto", "cuda:1"))
    with pytest.raises(UserError, match="CUDA graphs need CUDA devices"):
        size_without_auto(SizingPlan(config="c.json", cuda_graphs=True))


def test_a_run_says_and_keeps_what_auto_became(tmp_path: Path, capsys: Any) -> None:
    pair = in_dtype(write_pair(tmp_path / "pair"), "bfloat16")
    out = ["--limit", "2", "--tasks", "miniature_sort", "--max-new-tokens", "4", "--out", str(tmp_path)]
    assert cli.main(["run", "--model", str(pair), "--baseline-dtype", "bfloat16", "--batch-size", "auto", *out]) == 0
    shown = capsys.readouterr().err
    run = store.load(store.find_runs(tmp_path, "run")[0])
    line = (
        "auto: device cpu (torch finds neither CUDA nor MPS here); dtype of the candidate float32 (stored in bfloat16, "
        "in which most CPUs are slow: --dtype bfloat16 keeps it); "
        "batch size 8 (the usual one; a CPU gains nothing from more)"
    )
    assert line in shown.splitlines()
    assert chosen_line(run.manifest.chosen) == line
    held = {
        name: run.manifest.plan.get(name) for name in ("devices", "dtype", "baseline_dtype", "batch_size", "decoder")
    }
    assert held == {
        "devices": ["cpu"], "dtype": "float32", "baseline_dtype": "bfloat16", "batch_size": 8,
        "decoder": "block_diffusion",
    }  # fmt: skip
    of = {cell.arm: cell.checkpoint for cell in run.manifest.cells}
    assert (of["baseline"].dtype, of["baseline"].tower, of["candidate"].dtype) == ("bfloat16", "context", "float32")
    assert cli.main(["run", "--resume", str(run.path), "--out", str(tmp_path)]) == 0
    folder = tt.report(run.path, out=tmp_path / "reports").folder
    assert line in (folder / "report.md").read_text(encoding="utf-8").replace("\\", "")


def test_a_resumed_run_is_refused_where_auto_gives_something_else(
    tmp_path: Path, half: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields: dict[str, Any] = {"tasks": "miniature_sort", "limit": 1, "max_new_tokens": 2, "progress": False}
    run = tt.evaluate(model=str(half), out=tmp_path, **fields)
    monkeypatch.setattr(choices, "HALF", ())  # as on a GPU: what is stored is kept
    monkeypatch.setattr(choices, "SINGLE", "bfloat16")
    with pytest.raises(UserError, match="dtype was float32, is bfloat16"):
        tt.evaluate(resume=run, dtype="auto", out=tmp_path, progress=False)
    assert tt.evaluate(resume=run, out=tmp_path, progress=False).record.complete


class OfSize:
    """A model on a GPU that has room for some tokens."""

    has_denoiser = False
    checkpoint = dataclasses.replace(tt.load_model("miniature").checkpoint, devices=("cuda:0",))

    def __init__(self, room: int) -> None:
        self.room = room

    def prefill(self, ids_BS: torch.Tensor) -> int:
        if ids_BS.numel() > self.room:
            raise torch.OutOfMemoryError("no room")
        return ids_BS.numel()

    def extend(self, context: int, ids_BK: torch.Tensor) -> int:
        return context + ids_BK.numel()


@pytest.mark.parametrize(
    ("room", "num_requests", "size"), [(1000, 500, 64), (1000, 5, 8), (7, 500, 1), (10**6, 500, 256)]
)
def test_the_largest_batch_that_fits_on_a_gpu(room: int, num_requests: int, size: int) -> None:
    arms: Any = [OfSize(10**7), OfSize(room)]
    found = choose_batch_size(arms, lambda _: 11, num_requests=num_requests)
    assert (found.value, found.reason) == (str(size), "fits")


def test_a_checkpoint_that_is_checked_has_one_arm() -> None:
    plan, chosen = without_auto(VerifyPlan())
    assert (plan.dtype, plan.devices) == ("float32", ("cpu",))
    assert [(one.setting, one.arm) for one in chosen] == [("device", None), ("dtype", None)]


def test_two_models_of_one_token_at_a_time_need_no_decoder_named(tmp_path: Path) -> None:
    first, second = save_reading("llama", tmp_path / "first"), save_reading("gpt2", tmp_path / "second")
    fields: dict[str, Any] = {"tasks": "miniature_sort", "limit": 2, "max_new_tokens": 4, "progress": False}
    run = tt.evaluate(model=str(first), baseline=str(second), out=tmp_path, **fields).record
    assert {cell.arm: cell.decoder.kind for cell in run.manifest.cells} == dict.fromkeys(
        ("baseline", "candidate"), "autoregressive"
    )
    with pytest.raises(UserError, match="'autoregressive' has no block_size"):
        tt.evaluate(model=str(first), baseline=str(second), out=tmp_path, block_sizes=8, **fields)
    with pytest.raises(UserError, match="denoiser"):
        tt.evaluate(model=str(first), baseline=str(second), out=tmp_path, decoder="block_diffusion", **fields)


@pytest.mark.parametrize("wrong", ["gpu", "cpu,cpu", "meta", "cuda:x"])
@pytest.mark.parametrize("option", ["--device", "--baseline-device"])
def test_a_device_that_there_is_not_is_one_line_before_anything_else(
    option: str, wrong: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["run", "--tasks", "miniature_sort", "--limit", "1", "--baseline", "miniature", option, wrong]
    if (option, wrong) != ("--device", "cpu,cpu"):  # two devices for two towers, of which one is named twice
        assert cli.main(given) == 2
        assert f"device '{wrong}' cannot be used here" in capsys.readouterr().err
