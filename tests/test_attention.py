"""How Hugging Face models compute attention: as asked for, per arm, in the identity of cells and in reports."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import save_reading
from transformers.models.llama import modeling_llama

import twotower_eval as tt
from twotower_eval.engine.models import transformers_types
from twotower_eval.errors import UserError
from twotower_eval.plan import RunPlan, SpeedPlan, VerifyPlan
from twotower_eval.records import Cell, DecoderSpec, Workload, cell_id, to_json

ROW = [5, 6, 7, 8, 9, 10, 11]
SMALL = {"tasks": ("miniature_recall",), "limit": 2, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reading("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_transformers_own_model_with_the_same_attention_gives_the_same_logits(llama: Path, attention: str) -> None:
    ours = tt.load_model(llama, attention=attention)
    assert ours.checkpoint.attention == attention
    auto = transformers.AutoModelForCausalLM
    theirs = auto.from_pretrained(llama, attn_implementation=attention, dtype=torch.float32).eval()
    assert ours.inner.config._attn_implementation == theirs.config._attn_implementation == attention
    with torch.inference_mode():
        expected = theirs(torch.tensor([ROW])).logits[:, -1]
        found = ours.next_logits(ours.prefill(torch.tensor([ROW])))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_attention_that_is_not_there_is_one_line(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(model: str | Path, attention: str) -> str:
        with pytest.raises(UserError) as raised:
            tt.load_model(model, attention=attention)
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "attention 'fast' is unknown; choose from sdpa, eager, flash" in told(llama, "fast")
    assert "FlashAttention2 has been toggled on, but" in told(llama, "flash_attention_2")
    assert "flex_attention compiles anew for every length on a CPU" in told(llama, "flex_attention")
    assert "no Hugging Face model, so attention 'sdpa' has no effect" in told("miniature", "sdpa")
    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, "sdpa", _raising)
    assert "cannot be run, not even without a cache: its forward raised RuntimeError: no kernel" in told(llama, "sdpa")


def _raising(*_: object, **__: object) -> None:
    raise RuntimeError("no kernel\nfor this device")


def test_kernels_of_half_precision_prove_themselves_in_it(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of flash-attn, which take nothing else: the model's own code is proved in float32 by torch's."""
    eager = modeling_llama.eager_attention_forward
    read: list[torch.dtype] = []

    def of_halves(module: object, query: torch.Tensor, *more: Any, **named: Any) -> Any:
        read.append(query.dtype)
        if query.dtype == torch.float32:
            raise RuntimeError("only support fp16 and bf16 data type")
        return eager(module, query, *more, **named)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", of_halves)
    monkeypatch.setattr(transformers_types, "HALF_ONLY", ("eager",))
    ours = tt.load_model(llama, attention="eager", dtype="bfloat16")
    assert ours.ways.cached
    assert ours.ways.precision == "float32"
    assert set(read) == {torch.bfloat16}
    assert ours.inner.config._attn_implementation == "eager"
    with pytest.raises(UserError, match="eager computes in bfloat16 and float16 only, not in float32"):
        tt.load_model(llama, attention="eager")


@pytest.mark.parametrize(
    "plan",
    [
        RunPlan(attention="sdpa", **SMALL),
        SpeedPlan(attention="sdpa", tasks=SMALL["tasks"]),
        VerifyPlan(attention="sdpa"),
        RunPlan(baseline="miniature", baseline_attention="sdpa", **SMALL),
    ],
)
def test_it_is_refused_where_no_arm_is_a_hugging_face_model(plan: RunPlan | SpeedPlan | VerifyPlan) -> None:
    from twotower_eval.measure.chosen import without_auto

    with pytest.raises(UserError, match=r"has no effect: .*no .*Hugging Face model"):
        without_auto(plan)


def test_arms_with_their_own_attention_are_two_models_with_ids_of_their_own(llama: Path, tmp_path: Path) -> None:
    run = tt.evaluate(
        model=str(llama),
        baseline=str(llama),
        attention="sdpa",
        baseline_attention="eager",
        dtype="float32",
        out=tmp_path,
        progress=False,
        **SMALL,
    )
    cells = run.record.manifest.cells
    assert {cell.arm: cell.checkpoint.attention for cell in cells} == {"baseline": "eager", "candidate": "sdpa"}
    assert len({cell.id for cell in cells}) == 2
    assert all(cell.id == _id(cell) for cell in cells)
    text = (tt.report(run.path, out=tmp_path / "reports").folder / "report.md").read_text(encoding="utf-8")
    assert "| attention |" in text
    assert "`eager`" in text


def _id(cell: Cell) -> str:
    return cell_id(cell.checkpoint, cell.decoder, cell.workload, cell.extra)


def test_what_is_not_given_leaves_plans_and_ids_as_they_were(llama: Path) -> None:
    assert "attention" not in to_json(RunPlan())
    assert "attention" not in to_json(VerifyPlan())
    plain, named = tt.load_model(llama).checkpoint, tt.load_model(llama, attention="sdpa").checkpoint
    assert "attention" not in to_json(plain)
    decoder = DecoderSpec(kind="autoregressive", params={})
    workload = Workload(kind="task", name="x", digest="0" * 64)
    assert cell_id(plain, decoder, workload) != cell_id(named, decoder, workload)
