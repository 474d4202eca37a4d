"""What a model is: not its tensors alone, but every file of its folder that decides a logit or a text."""

import dataclasses
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_models import SMALL
from safetensors.torch import load_file, save_file
from tiny_pair import write_pair

from twotower_eval import store
from twotower_eval.analyse.compare.points import point_key
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.identity import causal_identity, folder_settings
from twotower_eval.engine.scorers import make_scorer
from twotower_eval.engine.scorers.pieces import ScoreRequest
from twotower_eval.measure import harness, speed, suites
from twotower_eval.measure.harness.adapter import HarnessLM
from twotower_eval.miniature.export import write_tokenizer
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.records import Cell, Checkpoint, DecoderSpec, Workload, cell_id, to_json
from twotower_eval.strict import from_json

EXPERTS = {
    "hybrid_override_pattern": "M*E",
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
}
WORK = (DecoderSpec(kind="autoregressive"), Workload(kind="task", name="t", digest="d"))


@pytest.fixture
def pair(tmp_path: Path) -> Path:
    return write_pair(tmp_path / "pair", **EXPERTS)


@pytest.fixture
def base(pair: Path, tmp_path: Path) -> Path:
    """The AR base folder of the pair's context tower: other names, other layout, equal in all that matters."""
    folder = tmp_path / "base"
    weights, prefix = load_file(str(pair / "model.safetensors")), "context_tower."
    tensors = {"backbone." + name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
    folder.mkdir()
    save_file({**tensors, "lm_head.weight": weights["context_lm_head.weight"]}, str(folder / "model.safetensors"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(pair / name, folder / name)
    config = json.loads((pair / "config.json").read_text())
    del config["mask_token_id"]
    config |= {"transformers_version": "5.23.0", "torch_dtype": "bfloat16", "_name_or_path": "somewhere/else"}
    (folder / "config.json").write_text(json.dumps(config, indent=3))
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "llama")


def write_llama(folder: Path, **changes: Any) -> Path:
    config = transformers.LlamaConfig(**{**SMALL, "vocab_size": 112, **changes})
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def change(name: str, **values: Any) -> Callable[[Path], None]:
    """Lays values over a JSON file of a folder, which need not be there."""

    def edit(folder: Path) -> None:
        file = folder / name
        data = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**data, **values}))

    edit.__name__ = f"{name}: {', '.join(values)}"
    return edit


def swap_two_tokens(folder: Path) -> None:
    file = folder / "tokenizer.json"
    data = json.loads(file.read_text())
    vocab = data["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    file.write_text(json.dumps(data))


def scale_a_tensor(folder: Path) -> None:
    file = str(folder / "model.safetensors")
    tensors = load_file(file)
    name = next(name for name in tensors if name.endswith("head.weight"))
    save_file({**tensors, name: tensors[name] * 2}, file, metadata={"format": "pt"})


EDITS = {
    "config.json": change("config.json", num_experts_per_tok=1),
    "generation_config.json": change("generation_config.json", eos_token_id=7),
    "tokenizer.json": swap_two_tokens,
    "tokenizer_config.json": change("tokenizer_config.json", bos_token="<pad>"),
    "special_tokens_map.json": change("special_tokens_map.json", bos_token="<pad>"),
    "added_tokens.json": change("added_tokens.json", extra=95),
}


# Cells


@pytest.mark.parametrize("name", EDITS)
def test_a_folder_with_another_file_is_another_model(pair: Path, name: str) -> None:
    before = load_model(pair)
    EDITS[name](pair)
    after = load_model(pair)
    assert before.checkpoint.digest == after.checkpoint.digest, "the tensors are the same"
    assert cell_id(before.checkpoint, *WORK) != cell_id(after.checkpoint, *WORK)
    assert causal_identity(before) != causal_identity(after)


def test_where_a_folder_lies_and_how_its_weights_are_cut_changes_no_cell(pair: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(pair, tmp_path / "elsewhere"))
    weights = load_file(str(pair / "model.safetensors"))
    names = sorted(weights)
    shards = {f"model-0000{number}.safetensors": names[number::2] for number in (0, 1)}
    for file, held in shards.items():
        save_file({name: weights[name] for name in held}, str(copied / file))
    index = {"weight_map": {name: file for file, held in shards.items() for name in held}}
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    (copied / "model.safetensors").unlink()
    one, other = load_model(pair), load_model(copied)
    assert cell_id(one.checkpoint, *WORK) == cell_id(other.checkpoint, *WORK)
    assert {file.name for file in other.checkpoint.weights} == set(shards)


def test_quality_and_speed_of_another_config_are_not_of_one_point(pair: Path) -> None:
    """Both halves of a joint claim are of one thing, and its verify run too."""
    one = load_model(pair).checkpoint
    EDITS["config.json"](pair)
    cells = [
        Cell(id="c", arm="candidate", checkpoint=checkpoint, decoder=WORK[0], workload=WORK[1])
        for checkpoint in (one, load_model(pair).checkpoint)
    ]
    assert point_key(cells[0]) != point_key(cells[1])


def test_a_checkpoint_of_an_older_run_is_its_tensors() -> None:
    """Published runs know of no files: their cells and points stay what they were."""
    old = Checkpoint(name="n", family="f", source="s", digest="d", dtype="float32", devices=("cpu",))
    assert old.identity == "d"
    assert from_json(Checkpoint, {k: v for k, v in to_json(old).items() if k not in ("files", "weights")}) == old


# Sharing


@pytest.mark.parametrize("names", [("dtype", "architectures"), ("use_cache", "_name_or_path")])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "added_tokens.json"])
def test_a_token_may_be_called_as_settings_are(tmp_path: Path, name: str, names: tuple[str, str]) -> None:
    """Names of bookkeeping were left out of vocabularies too: two tokenizers with such ids swapped were one."""
    found = []
    for swapped in (names, names[::-1]):
        vocab = {token: number for number, token in enumerate(swapped)}
        (tmp_path / name).write_text(json.dumps({"model": {"vocab": vocab}} if name == "tokenizer.json" else vocab))
        found.append(folder_settings(tmp_path))
    assert found[0] != found[1]


def test_a_part_of_a_config_may_be_called_as_bookkeeping_is(tmp_path: Path) -> None:
    """The dtype that a config is loaded in goes unsaid, that of its quantization does not."""
    found = []
    for dtype in ("float16", "bfloat16"):
        quantized = {"quantization_config": {"dtype": dtype}, "torch_dtype": dtype}
        (tmp_path / "config.json").write_text(json.dumps(quantized))
        found.append(folder_settings(tmp_path)["config.json"])
    assert found == [{"quantization_config": {"dtype": dtype}} for dtype in ("float16", "bfloat16")]


def answered_by(run: store.Run) -> set[str]:
    """Arms that have log-likelihoods of their own."""
    return {run.cells[row.cell].arm for row in run.likelihoods}


def test_a_base_folder_that_differs_in_nothing_that_matters_shares(pair: Path, base: Path, tmp_path: Path) -> None:
    plan = RunPlan(model=str(pair), baseline=str(base), tasks=("miniature_choice",), limit=2)
    assert answered_by(store.load(harness.run(plan, root=tmp_path / "runs"))) == {"baseline"}


@pytest.mark.parametrize("name", EDITS)
def test_a_base_folder_with_another_file_is_computed_for_itself(
    pair: Path, base: Path, tmp_path: Path, name: str
) -> None:
    EDITS[name](base)
    plan = RunPlan(model=str(pair), baseline=str(base), tasks=("miniature_choice",), limit=2)
    run = store.load(harness.run(plan, root=tmp_path / "runs"))
    assert answered_by(run) == {"baseline", "candidate"}
    assert not any("computed once" in note for note in run.manifest.notes)


def test_a_baseline_with_fewer_experts_is_scored_by_its_own_logits(pair: Path, base: Path, tmp_path: Path) -> None:
    """Both arms were given the candidate's log-likelihoods, because their tensors were equal."""
    EDITS["config.json"](base)
    plan = RunPlan(model=str(pair), baseline=str(base), tasks=("miniature_perplexity",), limit=1)
    run = store.load(harness.run(plan, root=tmp_path / "runs"))
    found = {run.cells[row.cell].arm: row.likelihood.logprob_nats for row in run.likelihoods}
    [task] = suites.resolve_tasks(["miniature_perplexity"], limit=1)
    for arm, folder in (("baseline", base), ("candidate", pair)):
        model = load_model(folder)
        ids = tuple(model.tokenizer.encode(task.docs[0].instances[0].args[0]))
        asked = ScoreRequest(context_ids=(model.tokenizer.bos_token_id,), continuation_ids=ids)
        kind = "exact" if arm == "baseline" else "context_tower"
        [right] = make_scorer(model, kind).score([asked])
        assert found[arm] == pytest.approx(right.logprob_nats, abs=1e-3)
    assert abs(found["baseline"] - found["candidate"]) > 0.1


@pytest.mark.parametrize(
    "edit",
    [
        change("config.json", rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}),
        change("config.json", rms_norm_eps=0.1),
        change("generation_config.json", eos_token_id=[2, 9]),
        change("tokenizer_config.json", bos_token="<pad>"),
    ],
    ids=lambda edit: edit.__name__,
)
def test_two_hugging_face_folders_of_equal_tensors_are_two_models(
    llama: Path, tmp_path: Path, edit: Callable[[Path], None]
) -> None:
    other = Path(shutil.copytree(llama, tmp_path / "other"))
    edit(other)
    plan = RunPlan(
        model=str(other), baseline=str(llama), decoder="autoregressive", tasks=("miniature_choice",), limit=2
    )
    run = store.load(harness.run(plan, root=tmp_path / "runs"))
    assert [cell.arm for cell in run.manifest.cells] == ["baseline", "candidate"]
    assert answered_by(run) == {"baseline", "candidate"}


@pytest.mark.parametrize(("edit", "num_read"), [(None, 1), ("tokenizer.json", 2), ("generation_config.json", 2)])
def test_texts_are_tried_once_for_each_way_to_read_them(
    pair: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, edit: str | None, num_read: int
) -> None:
    """Two folders with equal tokenizers had every text of every task encoded twice before anything was computed."""
    if edit:
        EDITS[edit](base)
    tried = []
    check = HarnessLM.check_texts
    monkeypatch.setattr(HarnessLM, "check_texts", lambda lm, asked: (tried.append(len(asked)), check(lm, asked))[1])
    plan = RunPlan(model=str(pair), baseline=str(base), tasks=("miniature_sort",), limit=2, max_new_tokens=4)
    harness.run(plan, root=tmp_path / "runs")
    assert tried == [2] * num_read


# Resume


@pytest.fixture
def plan(pair: Path) -> RunPlan:
    return RunPlan(model=str(pair), tasks=("miniature_sort",), limit=2, max_new_tokens=4, block_sizes=(4,))


@pytest.mark.parametrize("name", [*EDITS, "model.safetensors"])
def test_a_resume_names_the_file_that_was_edited(plan: RunPlan, tmp_path: Path, name: str) -> None:
    path = harness.run(plan, root=tmp_path / "runs")
    {**EDITS, "model.safetensors": scale_a_tensor}[name](Path(plan.model))
    with pytest.raises(ValueError, match=rf"{re.escape(name)} of the candidate \w+ (was changed|is new)"):
        harness.run(plan, root=tmp_path / "runs", resume=path)
    assert store.load(path).complete, "a refused resume changes nothing"


def test_a_resume_names_the_arm(plan: RunPlan, base: Path, tmp_path: Path) -> None:
    plan = dataclasses.replace(plan, baseline=str(base))
    path = harness.run(plan, root=tmp_path / "runs")
    scale_a_tensor(base)
    with pytest.raises(ValueError, match=r"model.safetensors of the baseline somewhere/else was changed"):
        harness.run(plan, root=tmp_path / "runs", resume=path)
    (base / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match=r"tokenizer_config.json of the baseline somewhere/else is gone"):
        harness.run(plan, root=tmp_path / "runs", resume=path)


def test_a_resumed_timing_names_the_file_too(pair: Path, tmp_path: Path) -> None:
    plan = SpeedPlan(
        model=str(pair), tasks=("miniature_sort",), block_sizes=(4,), thresholds=(0.5,), num_prompts=2,
        new_tokens=4, min_rounds=1, warmup_rounds=0, costs=False,
    )  # fmt: skip
    requests = suites.build_requests(suites.resolve_tasks(plan.tasks))
    path = speed.run(plan, requests, root=tmp_path / "runs")
    EDITS["generation_config.json"](pair)
    with pytest.raises(ValueError, match=r"generation_config.json of the candidate \w+ is new"):
        speed.run(plan, requests, root=tmp_path / "runs", resume=path)
