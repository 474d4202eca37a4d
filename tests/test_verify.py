"""The parity preflight: passes what is sound, catches planted faults, says what it could not check."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_files import SHIPPED
from hf_models import save_tiny
from tiny_models import tiny_pair
from tiny_pair import write_pair

from twotower_eval import cli, store
from twotower_eval.api.runs import check_lines
from twotower_eval.engine.models import load_model
from twotower_eval.measure.verify import checks as batches
from twotower_eval.measure.verify import checks as numerics
from twotower_eval.measure.verify import verify
from twotower_eval.measure.verify.checks import block_sample, mock_ar_agreement
from twotower_eval.measure.verify.golden import golden_results, load_golden
from twotower_eval.measure.verify.run import make_prompts
from twotower_eval.plan import VerifyPlan
from twotower_eval.records import Check, CommitStep, Generation, Prompt
from twotower_eval.resources import data_path

PROMPTS = [Prompt(id=str(n), token_ids=tuple(range(4, 4 + n))) for n in (1, 5, 18)]


@pytest.fixture(autouse=True)
def _no_gradients() -> Any:
    with torch.inference_mode():
        yield


class Faulty:
    """A model whose answers are tampered with."""

    def __init__(self, model: Any, **changes: Any) -> None:
        self._model, self._changes = model, changes

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._model, name)
        change = self._changes.get(name)
        return value if change is None else (lambda *args, **options: change(value(*args, **options), *args))


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_the_shipped_pair_passes_and_the_folder_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify", "--out", str(tmp_path)]) == 0
    (path,) = store.find_runs(tmp_path, "verify")
    run = store.load(path)
    assert run.complete
    (cell,) = run.manifest.cells
    assert cell.workload.kind == "checks"
    found = by_name(run.checks)
    assert {name for name, check in found.items() if check.outcome == "failed"} == set()
    assert (found["tokens_per_nfe"].value or 0) > 1
    assert found["batch_equals_single"].limit == 1e-4
    assert {name for name, check in found.items() if check.outcome == "not_checked"} == {
        "golden_context", "golden_denoiser", "golden_states", "golden_tokens", "static_equals_greedy",
    }  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(run.checks) + 1
    assert lines[-1] == check_lines(run.checks, path)[-1]


def test_an_autoregressive_model_is_checked_as_far_as_it_goes(tmp_path: Path) -> None:
    """A Hugging Face model, without denoiser or Mamba layers of ours."""
    checks = by_name(
        store.load(verify(VerifyPlan(model=str(save_tiny("llama", tmp_path / "hf"))), root=tmp_path)).checks
    )
    passed = {name for name, check in checks.items() if check.outcome == "passed"}
    assert {"finite_logits", "blockwise_context", "batch_equals_single"} <= passed
    for name in ("seeded_scan", "mock_ar_agreement", "tokens_per_nfe", "forced_share"):
        assert checks[name].outcome == "not_checked"
        assert checks[name].detail


def test_golden_outputs_are_matched_by_their_own_checkpoint_and_by_no_other(tmp_path: Path) -> None:
    folder = SHIPPED / "public"
    found = {f.name: f for f in golden_results(load_golden(folder, None, "cpu"))}
    assert {f.outcome for f in found.values()} == {"passed"}
    assert found["golden_tokens"].detail.split()[0] == found["golden_tokens"].detail.split()[2]
    bare = tmp_path / "outputs"
    bare.mkdir()
    for name in ("golden.json", "golden.safetensors"):
        shutil.copy(folder / name, bare / name)
    nudged = load_model(folder)
    nudged.denoiser.head.weight.data.mul_(1.001)
    wrong = {f.name: f.outcome for f in golden_results(load_golden(bare, nudged, "cpu"))}
    assert wrong["golden_denoiser"] == "failed"
    assert wrong["golden_context"] == wrong["golden_states"] == "passed"


@pytest.mark.parametrize(("name", "text"), [("golden.json", "{"), ("golden.json", "[]"), ("golden.safetensors", None)])
def test_golden_folders_that_are_none_are_one_clear_line(tmp_path: Path, name: str, text: str | None) -> None:
    for part in ("golden.json", "golden.safetensors"):
        (tmp_path / part).write_text("{}" if text is None else text)
    if text is None:
        (tmp_path / name).unlink()
    with pytest.raises(ValueError, match=name):
        load_golden(tmp_path, tiny_pair(), "cpu")


def test_logits_that_are_not_finite_fail() -> None:
    def spoil(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        return logits.index_fill(-1, torch.tensor([7]), float("nan"))

    assert numerics.finite_logits(tiny_pair(), PROMPTS).outcome == "passed"
    found = numerics.finite_logits(Faulty(tiny_pair(), denoise=spoil), PROMPTS)
    assert (found.outcome, found.value) == ("failed", 3 * 4 * numerics.BLOCK_SIZE)
    assert mock_ar_agreement(Faulty(tiny_pair(), denoise=spoil), PROMPTS).outcome == "failed"


def test_a_context_that_forgets_between_blocks_fails() -> None:
    def forget(context: Any, *args: Any) -> Any:
        return tiny_pair().prefill(args[1])

    assert numerics.blockwise_context(tiny_pair(), PROMPTS, "float32").outcome == "passed"
    assert numerics.blockwise_context(Faulty(tiny_pair(), extend=forget), PROMPTS, "float32").outcome == "failed"


def test_a_scan_that_loses_its_seed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault of a kernel that ignores initial states: all is well until a context is carried on."""
    plain = numerics.ssd
    assert numerics.seeded_scan(tiny_pair(), 0).outcome == "passed"
    monkeypatch.setattr(numerics, "ssd", lambda *args: plain(*args[:5], torch.zeros_like(args[5])))
    found = numerics.seeded_scan(tiny_pair(), 0)
    assert found.outcome == "failed"
    assert found.value is not None
    assert found.value > 0.01


def test_a_scan_that_depends_on_its_chunks_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = numerics.ssd_chunked

    def faulty(*args: Any, chunk: int) -> Any:
        y, states = plain(*args, chunk=chunk)
        return (y * 1.001 if chunk == 128 else y), states

    monkeypatch.setattr(numerics, "ssd_chunked", faulty)
    assert numerics.seeded_scan(tiny_pair(), 0).outcome == "failed"


def test_a_batch_whose_rows_depend_on_each_other_fails() -> None:
    """Rows that leak into each other are what the gate is there for. The released sampler's batch mean of t is no
    fault to plant here: on random weights nothing is confident, and rows that commit in step have one t."""

    class Leaking(Faulty):
        def denoise(self, *args: Any) -> torch.Tensor:
            logits_BKV: torch.Tensor = self._model.denoise(*args)
            return (logits_BKV + logits_BKV.mean(0, keepdim=True)) / 2

    assert batches.batch_logic(tiny_pair(), PROMPTS).outcome == "passed"
    found = batches.batch_logic(Leaking(tiny_pair()), PROMPTS)
    assert found.outcome == "failed"
    assert found.value is not None
    assert found.value > batches.MARGIN


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_failure_without_a_finite_value_reaches_the_journal(monkeypatch: pytest.MonkeyPatch, value: float) -> None:
    """An output that ends early in a batch has no margin: writing infinity raised, the run held no failed check, and
    claims took it for one that was stopped."""
    monkeypatch.setattr(batches, "_margin", lambda *args: value)
    monkeypatch.setattr(batches, "_both", lambda model, kind, prompts: [different(prompt) for prompt in prompts])
    found = batches.batch_logic(tiny_pair(), PROMPTS)
    assert (found.outcome, found.value, found.limit) == ("failed", None, batches.MARGIN)
    assert found.detail.endswith("; the value is not finite")
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def different(prompt: Prompt) -> tuple[Prompt, Generation, Generation]:
    whole = _generation(tiny_pair(), prompt)
    return prompt, dataclasses.replace(whole, token_ids=whole.token_ids[:3]), whole


def test_a_difference_within_the_margin_passes_and_one_outside_fails() -> None:
    """On a model whose two best tokens are a hair apart, either is right; where they are not, neither is."""
    model = tiny_pair()
    prompt = PROMPTS[1]
    ids = torch.tensor([prompt.token_ids])
    best = model.next_logits(model.prefill(ids))[0].topk(2).indices.tolist()
    assert batches._token_margin(model, prompt, [best[1]], [best[0]]) > batches.MARGIN
    assert batches._token_margin(model, prompt, [best[0]], [best[0], best[1]]) == float("inf")

    def tie(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        return logits.index_copy(-1, torch.tensor([best[1]]), logits[..., best[:1]] - 5e-5)

    near = batches._token_margin(Faulty(model, next_logits=tie), prompt, [best[1]], [best[0]])
    assert 0 < near <= batches.MARGIN


def test_commits_that_part_are_judged_by_the_confidence_that_parted_them() -> None:
    model, prompt = tiny_pair(), PROMPTS[2]
    alone = _generation(model, prompt)
    assert alone.trace is not None
    step = alone.trace[1]
    other = next(p for p in range(16) if p not in step.positions and p not in alone.trace[0].positions)
    changed = dataclasses.replace(step, positions=(*step.positions[1:], other), token_ids=(*step.token_ids[1:], 5))
    trace: list[CommitStep] = [alone.trace[0], changed]
    assert batches._step_margin(model, prompt, alone.trace, alone.trace) == float("inf")  # never asked of equal ones
    assert batches._step_margin(model, prompt, trace, alone.trace) > batches.MARGIN
    token = dataclasses.replace(step, token_ids=((step.token_ids[0] + 1) % 30 + 4, *step.token_ids[1:]))
    assert batches._step_margin(model, prompt, [alone.trace[0], token], alone.trace) > batches.MARGIN


def _generation(model: Any, prompt: Prompt) -> Generation:
    from twotower_eval.engine.decoders import make_decoder

    return make_decoder(model, "block_diffusion", trace=True).generate([prompt], max_new_tokens=20)[0]


def test_a_pair_that_gains_nothing_fails(tmp_path: Path) -> None:
    """Random weights are never sure: one token a pass, the price of two towers for the pace of one."""
    model = load_model(write_pair(tmp_path / "pair"))
    sample, forced = block_sample(model, make_prompts(model, 0))
    assert sample.outcome == "failed"
    assert sample.value is not None
    assert sample.value <= 1
    assert forced.value == 1.0


def test_the_exit_code_is_5_where_a_check_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(numerics, "SCAN_LIMIT", -1.0)
    assert cli.main(["verify", str(write_pair(tmp_path / "pair")), "--out", str(tmp_path)]) == 5
    assert "FAILED: seeded_scan" in capsys.readouterr().out.splitlines()[-1]


def test_prompts_are_text_for_who_can_read_and_ids_without_the_mask_for_others() -> None:
    miniature = load_model(data_path("miniature", "pair"))
    assert all(prompt.text for prompt in make_prompts(miniature, 0))
    assert len({len(prompt.token_ids) for prompt in make_prompts(miniature, 0)}) > 2
    drawn = make_prompts(tiny_pair(), 0)
    assert all(tiny_pair().mask_token_id not in prompt.token_ids for prompt in drawn)
    assert drawn == make_prompts(tiny_pair(), 0) != make_prompts(tiny_pair(), 1)


def test_a_table_has_a_line_for_each_check() -> None:
    checks = [
        Check(cell="c", name="one", outcome="passed", detail="fine", value=0.5, limit=1.0),
        Check(cell="c", name="another", outcome="not_checked", detail="why"),
        Check(cell="c", name="third", outcome="failed", detail="bad", value=3.0, limit=1.0),
        Check(cell="c", name="forced_share", outcome="passed", detail="seen", value=0.25),
        Check(cell="c", name="tokens_per_nfe", outcome="passed", detail="many", value=5.47, limit=1.0),
    ]
    lines = check_lines(checks, Path("run"))
    assert "0.5 (at most 1)" in lines[0]
    assert lines[3].startswith("measured     forced_share")
    assert "5.47 (above 1)" in lines[4]
    assert lines[1].startswith("not checked  another")
    assert lines[-1] == "run: FAILED: third; 2 passed, 1 measured, 1 not checked"
    assert check_lines(checks[:2], Path("run"))[-1] == "run: nothing failed: 1 passed, 1 not checked"
