"""Steps over a static cache give the tokens of the ``autoregressive`` decoder, compiled or not."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import CONFIGS, SMALL, save_reading, save_tiny

from twotower_eval import cli, store
from twotower_eval.engine.decoders import decoder_spec, make_decoder
from twotower_eval.engine.decoders.static_cache import columns_for
from twotower_eval.engine.models import load_model, transformers_static
from twotower_eval.engine.models.counting import UncountedForwards, WatchedModel
from twotower_eval.engine.models.transformers_static import StaticSize
from twotower_eval.errors import UserError
from twotower_eval.measure.verify.checks import static_verified
from twotower_eval.records import Generation, Prompt

MORE = {"qwen2": transformers.Qwen2Config(**SMALL), "gpt_neox": transformers.GPTNeoXConfig(**SMALL)}
PROMPTS = [Prompt(id=str(at), token_ids=tuple(range(5, 8 + 3 * at)), seed=at) for at in range(5)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for name, config in MORE.items():
            patch.setitem(CONFIGS, name, config)
        yield {name: load_model(save_tiny(name, tmp_path_factory.mktemp(name))) for name in CONFIGS}


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Torch's own front end, whose graphs run as they are: quick, and no compiler needed."""
    made: list[Any] = []

    def compiled(step: Any, mode: str | None) -> Any:
        made.append(mode)
        return torch.compile(step, dynamic=False, backend="eager")

    monkeypatch.setattr(transformers_static, "compiled", compiled)
    return made


def decoded(model: Any, kind: str, prompts: Sequence[Prompt] = PROMPTS, **given: Any) -> list[Generation]:
    names = ("max_new_tokens", "eos_token_ids", "max_batch_size")
    asked = {"max_new_tokens": 12, **{name: given.pop(name) for name in names if name in given}}
    return make_decoder(model, kind, **given).generate(prompts, **asked)


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen2", "gpt_neox"])
@pytest.mark.parametrize("size", [1, 2, 5, 8])
def test_tokens_and_counts_are_those_of_the_plain_decoder(name: str, size: int, models: Any) -> None:
    """Prompts of unlike lengths, rows that end early, and a last batch with empty slots."""
    model = models[name]
    free = decoded(model, "autoregressive")
    asked: dict[str, Any] = {"eos_token_ids": [free[0].token_ids[3], free[2].token_ids[1]], "max_batch_size": size}
    plain = decoded(model, "autoregressive", **asked)
    assert {one.finish for one in plain} >= {"eos"}
    assert decoded(model, "static_cache", **asked) == plain
    assert decoded(model, "static_cache", **asked, max_cache_len=40) == plain


def test_what_is_drawn_is_what_the_plain_decoder_draws(models: Any) -> None:
    assert decoded(models["llama"], "static_cache", temperature=0.9) == decoded(
        models["llama"], "autoregressive", temperature=0.9
    )


def test_transformers_own_static_cache_says_the_same(models: Any) -> None:
    model = models["llama"]
    ids = torch.tensor([PROMPTS[3].token_ids])
    asked: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    out = model.inner.generate(
        ids, attention_mask=torch.ones_like(ids), cache_implementation="static", disable_compile=True, **asked
    )
    (made,) = decoded(model, "static_cache", [PROMPTS[3]])
    assert list(made.token_ids) == out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", ["mistral", "lfm2", "mamba2"])
def test_windows_and_states_are_refused_in_one_line(name: str, models: Any) -> None:
    assert not models[name].steps_statically
    with pytest.raises(UserError, match=r"buffers of fixed size, and .* take autoregressive for it$"):
        make_decoder(models[name], "static_cache")


def test_our_own_towers_are_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="take autoregressive for it"):
        make_decoder(load_model("miniature"), "static_cache")


def test_verify_holds_static_steps_against_the_greedy_tokens(models: Any) -> None:
    same = static_verified(models["llama"], PROMPTS, "float32")
    assert (same.name, same.outcome, same.value) == ("static_equals_greedy", "passed", 0.0)
    assert static_verified(models["llama"], PROMPTS, "bfloat16").limit is None
    assert static_verified(models["mistral"], PROMPTS, "float32").outcome == "not_checked"


def test_a_model_whose_static_steps_are_wrong_is_refused(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = transformers_static.Buffers.inputs

    def shifted(self: Any, *given: Any) -> Any:
        ids, positions, mask = inputs(self, *given)
        return ids, positions + 1, mask

    model = models["qwen2"]
    monkeypatch.setattr(model, "_steps", None)
    monkeypatch.setattr(transformers_static.Buffers, "inputs", shifted)
    assert not model.steps_statically


def test_finished_rows_are_not_counted(models: Any) -> None:
    watched = WatchedModel(models["llama"])
    free = decoded(models["llama"], "autoregressive")
    asked: dict[str, Any] = {"eos_token_ids": [free[0].token_ids[3]], "max_batch_size": 5}
    made = decoded(watched, "static_cache", **asked)
    rows = sum(one.rows * one.num for one in watched.passes)
    assert rows == sum(one.num_context_forwards for one in made)
    assert min(one.num_context_forwards for one in made) < 12


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"compile": "fast"}, "compile must be true, false or one of default, reduce-overhead"),
        ({"compile": 1}, "compile must be true, false"),
        ({"max_cache_len": 0}, "max_cache_len must be a whole number of at least 2"),
        ({"max_cache_len": 20}, "max_cache_len=20 has no room for 27 tokens"),
        ({"columns": 3}, "has no parameter"),
    ],
)
def test_a_slip_is_one_line(given: Any, words: str, models: Any) -> None:
    with pytest.raises(UserError, match=words) as found:
        decoded(models["llama"], "static_cache", **given)
    assert "\n" not in str(found.value)


def test_lengths_that_are_read_without_a_cache_are_refused(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models["llama"], "plain_beyond", 20)
    with pytest.raises(UserError, match="reads contexts beyond 20 tokens without a cache, and 27 are asked for"):
        decoded(models["llama"], "static_cache")


def test_few_sizes_hold_all_lengths() -> None:
    sizes = [columns_for(num) for num in range(1, 3000)]
    assert all(size >= num for num, size in enumerate(sizes, start=1))
    assert sorted(set(sizes)) == [64, 128, *range(256, 3073, 256)]


def test_modes_are_operating_points() -> None:
    labels = {decoder_spec("static_cache", compile=mode).label for mode in (True, "default", "reduce-overhead")}
    assert len(labels) == 2
    assert "compile" not in decoder_spec("static_cache").label


def test_compiled_steps_give_the_same_and_are_compiled_once(models: Any, traced: list[Any]) -> None:
    model = models["llama"]
    plain = decoded(model, "autoregressive", max_batch_size=3)
    before = model.static_steps.num_made
    for _ in range(2):
        assert decoded(model, "static_cache", max_batch_size=3, compile="max-autotune") == plain
    made = model.static_steps.made[before:]
    assert [one.size for one in made] == [StaticSize(slots=3, columns=64, compile="max-autotune")]
    assert all(one.wall_s > 0 for one in made)
    assert traced == ["max-autotune"]


def test_a_compiled_step_that_gives_other_logits_is_refused(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers_static, "compiled", lambda step, mode: lambda *given: step(*given).flip(-1))
    with pytest.raises(UserError, match=r"torch.compile changes the logits of gpt2 by more than rounding"):
        decoded(models["gpt2"], "static_cache", compile=True)


def test_a_step_that_cannot_be_compiled_is_one_line(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def compiled(step: Any, mode: Any) -> Any:
        def backend(*_: Any) -> Any:
            raise NotImplementedError("no such kernel\nhere")

        return torch.compile(step, backend=backend)

    monkeypatch.setattr(transformers_static, "compiled", compiled)
    with pytest.raises(UserError, match=r"torch.compile cannot compile qwen2 here: .*no such kernel here") as found:
        decoded(models["qwen2"], "static_cache", compile=True)
    assert "\n" not in str(found.value)


def test_without_a_compiler_one_line_says_so(models: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor import cpp_builder, exc

    def none() -> str:
        raise exc.InvalidCxxCompiler

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", none)
    with pytest.raises(UserError, match=r"compile needs a C\+\+ compiler on a CPU, and none was found"):
        make_decoder(models["llama"], "static_cache", compile=True)
    make_decoder(models["llama"], "static_cache")


def test_compiled_steps_count_as_forwards_also_where_nobody_asked(models: Any, traced: list[Any]) -> None:
    """A compiled step enters no module of the network, but the one that runs it."""
    model = models["llama"]
    uncounted, watched = UncountedForwards([model]), WatchedModel(model)
    with uncounted.noted(watched):
        decoded(watched, "static_cache", compile=True)
        assert uncounted.num == 0
        decoded(model, "static_cache", compile=True)
        assert uncounted.num > 0
    assert traced


@pytest.fixture(scope="module")
def reading(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_reading("llama", tmp_path_factory.mktemp("reading"))


def test_a_compiled_baseline_is_timed_and_its_compilation_is_said(
    reading: Path, tmp_path: Path, traced: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    common = ["--tasks", "miniature_sort", "--out", str(tmp_path), "--threads", "1", "--new-tokens", "6"]
    common += [
        "--num-prompts",
        "2",
        "--batch-sizes",
        "2",
        "--probes",
        "2",
        "--min-rounds",
        "2",
        "--device",
        "cpu",
        "--dtype",
        "float32",
    ]
    arms = ["--model", str(reading), "--baseline", str(reading), "--decoder", "prompt_lookup"]
    decoder = ["--baseline-decoder", "static_cache", "--baseline-set", "compile=true"]
    assert cli.main(["speed", *common, *arms, *decoder]) == 0
    [path] = store.find_runs(tmp_path, "speed")
    run = store.load(path)
    [baseline] = [cell for cell in run.manifest.cells if cell.arm == "baseline"]
    assert baseline.decoder.params["compile"] is True
    events = [event for event in run.events if event["kind"] == "compiled"]
    sizes = [(event["rows"], event["columns"], event["mode"]) for event in events]
    assert {(rows, mode) for rows, _, mode in sizes} == {(1, "default"), (2, "default")}, "a witnessed call has one row"
    assert len(set(sizes)) == len(sizes) == len(traced)
    assert {event["model"] for event in events} == {baseline.checkpoint.name}
    assert all(float(str(event["wall_s"])) > 0 for event in events)
    assert {row.part for row in run.costs if row.cell == baseline.id} == {"prefill", "ar_step", "bookkeeping"}
    assert {row.fault for row in run.speed if row.phase == "measure"} == {None}
    assert cli.main(["report", str(path), "--out", str(tmp_path / "reports")]) == 0
    [report] = (tmp_path / "reports").glob("*/report.md")
    assert f"torch.compile: {len(events)} step" in report.read_text(encoding="utf-8")


def test_the_list_of_decoders_names_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "decoders", "static_cache", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["name"] == "static_cache"
    assert {"temperature", "compile", "max_cache_len"} <= set(
        json.dumps(found).replace('"', " ").replace("=", " ").split()
    )


@pytest.mark.slow
def test_a_step_that_the_compiler_has_made_gives_the_same_tokens(models: Any) -> None:
    model = models["llama"]
    assert decoded(model, "static_cache", compile=True, max_batch_size=4) == decoded(
        model, "autoregressive", max_batch_size=4
    )
