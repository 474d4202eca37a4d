"""Quantised Hugging Face checkpoints: loaded, proved, evaluated against the full-precision original, and shown."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import quantised, save_reading

import twotower_eval as tt
from twotower_eval.analyse.claims.text import retention_text
from twotower_eval.engine.models.quantised import held_bytes, quantisation_of
from twotower_eval.errors import UserError
from twotower_eval.records import Claim, DecoderSpec, OperatingPoint, Quantisation


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny Llama in float32, and the same with int8 weights by torchao, as transformers saves it."""
    full = save_reading("llama", tmp_path_factory.mktemp("models") / "full")
    return full, quantised(full, full.parent / "packed")


def test_a_quantised_model_is_loaded_and_proved(folders: tuple[Path, Path]) -> None:
    full, packed = folders
    ours = tt.load_model(packed)
    assert ours.checkpoint.quantisation == Quantisation(method="torchao", scheme="int8 weight-only")
    assert str(ours.checkpoint.quantisation) == "int8 weight-only by torchao"
    assert ours.ways.cached
    assert ours.ways.rows_together
    assert ours.ways.precision == "float32"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(packed)
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        assert torch.equal(ours.context_logits(ids), theirs(ids).logits)
    assert not torch.equal(ours.context_logits(ids), tt.load_model(full).context_logits(ids))


def test_bytes_are_those_that_are_stored(folders: tuple[Path, Path]) -> None:
    from safetensors import safe_open

    for folder in folders:
        with safe_open(folder / "model.safetensors", "pt") as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        stored = {name: tensor for name, tensor in stored.items() if not name.endswith("_zero_point")}
        found = held_bytes(tt.load_model(folder).parameters())
        assert found == pytest.approx(sum(tensor.nbytes for tensor in stored.values()), rel=0.02)


def test_the_digest_covers_what_is_stored(folders: tuple[Path, Path], tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    _, packed = folders
    changed = tmp_path / "changed"
    shutil.copytree(packed, changed)
    tensors = load_file(changed / "model.safetensors")
    with safe_open(packed / "model.safetensors", "pt") as file:
        metadata = file.metadata()
    name = next(name for name in tensors if name.endswith("_weight_qdata"))
    tensors[name][0, 0] += 1
    save_file(tensors, changed / "model.safetensors", metadata=metadata)
    first, second = tt.load_model(packed).checkpoint, tt.load_model(changed).checkpoint
    assert first.digest != second.digest
    assert first == tt.load_model(packed).checkpoint


def test_quantised_against_full_precision(folders: tuple[Path, Path], tmp_path: Path) -> None:
    full, packed = folders
    run = tt.evaluate(
        model=str(packed), baseline=str(full), out=tmp_path, tasks="miniature_sort", limit=3, max_new_tokens=6,
        progress=False,
    )  # fmt: skip
    of = {cell.arm: cell for cell in run.record.manifest.cells}
    assert {cell.decoder.kind for cell in of.values()} == {"autoregressive"}
    assert of["baseline"].checkpoint.quantisation is None
    assert tt.load_run(run.path).record.manifest.cells == run.record.manifest.cells
    text = (tt.report(run.path, out=tmp_path / "reports").folder / "report.md").read_text(encoding="utf-8")
    assert "int8 weight-only by torchao" in text


MISSING = {
    "bitsandbytes": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, "4-bit nf4", "pip install -U bitsandbytes"),
    "gptq": ({"bits": 4, "group_size": 128}, "4-bit", "pip install optimum"),
    "awq": ({"bits": 4, "group_size": 128, "version": "gemm"}, "4-bit", "pip install gptqmodel"),
    "compressed-tensors": ({"format": "pack-quantized"}, "pack-quantized", "pip install compressed-tensors"),
}


def configured(folder: Path, settings: dict[str, Any], into: Path) -> Path:
    shutil.copytree(folder, into)
    config = json.loads((into / "config.json").read_text())
    (into / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return into


@pytest.mark.parametrize("method", MISSING)
def test_a_missing_package_is_one_line_that_says_what_to_install(
    method: str, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    settings, scheme, hint = MISSING[method]
    folder = configured(folders[0], {"quant_method": method, **settings}, tmp_path / method)
    found = quantisation_of(json.loads((folder / "config.json").read_text()))
    assert found == Quantisation(method=method, scheme=scheme)
    with pytest.raises(UserError, match=hint) as error:
        tt.load_model(folder)
    assert "\n" not in str(error.value)


def test_a_method_that_transformers_would_skip_is_refused(folders: tuple[Path, Path], tmp_path: Path) -> None:
    folder = configured(folders[0], {"quant_method": "zz"}, tmp_path / "zz")
    with pytest.raises(UserError, match="does not know the quantisation 'zz'"):
        tt.load_model(folder)


def test_weights_that_are_widened_as_they_are_loaded_say_so(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Float8 has no kernels on a CPU: transformers widens it."""
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    folder = configured(folders[0], settings, tmp_path / "fp8")
    loaded = tt.load_model(folder).checkpoint
    assert str(loaded.quantisation) == "float8 by fp8, dequantised as it was loaded"


def test_arms_of_unlike_dtypes_are_warned_of(folders: tuple[Path, Path], tmp_path: Path) -> None:
    full, _ = folders
    run = tt.evaluate(
        model=str(full), baseline=str(full), baseline_dtype="bfloat16", out=tmp_path, tasks="miniature_sort", limit=2,
        max_new_tokens=4, progress=False,
    )  # fmt: skip
    assert {cell.arm: cell.checkpoint.dtype for cell in run.record.manifest.cells} == {
        "baseline": "bfloat16", "candidate": "float32",
    }  # fmt: skip
    said = "float32 against the baseline's bfloat16: a difference may be due to dtype, not to the decoder"
    text = (tt.report(run.path, out=tmp_path / "reports").folder / "report.md").read_text(encoding="utf-8")
    assert said in text.partition("\n## ")[2].partition("\n## ")[0]
    point = OperatingPoint(name="p", decoder=DecoderSpec(kind="autoregressive", params={"temperature": 0.0}))
    claim = Claim(
        name="kept", quantity="score_difference", subject="full", baseline="full", point=point, source="here",
        scope=("miniature_sort",), expected=0.0, margin=0.5, metric="exact_match",
    )  # fmt: skip
    [verdict] = tt.judge(claim, run.path)
    assert [(one.setting, one.baseline, one.candidate) for one in verdict.unlike_arms] == [
        ("dtype", "bfloat16", "float32")
    ]
    assert f"WARNING: {said}" in retention_text(verdict)
