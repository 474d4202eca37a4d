"""``--cuda-graphs`` in `run` and `speed`: both arms or none, the same answers, and no capture inside a figure.

Everything but the capture itself runs on a CPU: steps are made where a GPU would capture them.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.checkpoint_files import base_names
from tests.hf_models import save_tiny
from tests.tiny_pair import write_pair
from twotower_eval import cli, make_decoder, plan_fields, store
from twotower_eval.analyse import report
from twotower_eval.engine import models
from twotower_eval.engine.models import arms as arms_room
from twotower_eval.engine.models import graphs, load_model
from twotower_eval.engine.models.graphs import StepGraphs, num_sizes
from twotower_eval.measure import harness, speed, suites
from twotower_eval.measure.speed import conditions
from twotower_eval.measure.speed.lanes import Lane, Timing
from twotower_eval.measure.speed.workloads import Call
from twotower_eval.miniature.export import write_tokenizer
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.records import Prompt

TASKS = ("miniature_sort", "miniature_recall")
BLOCK = 4
SETTINGS: dict[str, Any] = {"tasks": TASKS, "block_sizes": (BLOCK,), "thresholds": (0.1, 0.9), "batch_sizes": (1, 2)}
SETTINGS |= {"num_prompts": 4, "new_tokens": 9, "min_rounds": 2, "probes": 0}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With experts, whose routers a captured step has to ask, too."""
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "n_group": 1}
    experts |= {"topk_group": 1, "moe_shared_expert_intermediate_size": 8, "routed_scaling_factor": 1.0}
    pattern = {"hybrid_override_pattern": "M*E-", "num_hidden_layers": 4, "norm_topk_prob": True}
    return write_pair(tmp_path_factory.mktemp("pair"), **experts, **pattern)


@pytest.fixture(scope="module")
def requests() -> list[suites.TimedPrompt]:
    return suites.build_requests(suites.resolve_tasks(TASKS))


@pytest.fixture
def plan(pair: Path) -> SpeedPlan:
    return SpeedPlan(model=str(pair), **SETTINGS)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[StepGraphs]:
    """CPUs count as devices with graphs, contexts outgrow their slots often; the graphs that were given out."""
    monkeypatch.setattr(plan_fields, "GRAPH_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(graphs, "GRAPH_DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(graphs, "MIN_SLOTS", 8)
    found: list[StepGraphs] = []
    own = arms_room.use_graphs

    def noted(*args: Any, **options: Any) -> StepGraphs:
        found.append(own(*args, **options))
        return found[-1]

    monkeypatch.setattr(arms_room, "use_graphs", noted)
    return found


def with_graphs(plan: Any, **changes: Any) -> Any:
    return dataclasses.replace(plan, cuda_graphs=True, **changes)


def answers(run: store.Run) -> dict[tuple[Any, ...], list[str]]:
    """Hashes of the tokens of every measured call."""
    found = {}
    for sample in run.speed:
        cell = run.cells[sample.cell]
        key = (cell.arm, cell.decoder.label, sample.replica, sample.round, sample.phase, sample.call_id)
        found[key] = [prompt.tokens_sha256 for prompt in sample.prompts]
    return found


def captures_by_figure(monkeypatch: pytest.MonkeyPatch, made: Sequence[StepGraphs]) -> dict[tuple[Any, ...], list[int]]:
    """Steps made during each attempt at each timing of a whole call, by cell, copy, round and call."""
    monkeypatch.setattr(
        "twotower_eval.measure.speed.session.witnessings", lambda *of_round: ()
    )  # no figure comes of them
    found: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    own: Callable[[Lane, Call, int], Timing] = Lane.time

    def noted(lane: Lane, call: Call, number: int) -> Timing:
        before = sum(each.num_made for each in made)
        timing = own(lane, call, number)
        found[lane.cell.id, lane.replica, number, call.id].append(sum(each.num_made for each in made) - before)
        return timing

    monkeypatch.setattr(Lane, "time", noted)
    return found


def test_a_timed_run_gives_the_same_tokens(plan, requests, made, tmp_path):
    plain = store.load(speed.run(plan, requests, root=tmp_path))
    assert not made
    run = store.load(speed.run(with_graphs(plan), requests, root=tmp_path))
    assert run.complete
    assert answers(run) == answers(plain)
    assert run.manifest.plan["cuda_graphs"] is True
    # Times with and without are never pooled, and tables tell them apart.
    assert not set(run.cells) & set(plain.cells)
    assert {cell.workload.name for cell in run.manifest.cells} == {f"answer: {', '.join(TASKS)}, CUDA graphs"}
    [shared] = made  # the context tower's are the pair's
    assert {key[:1] + key[2:4] for key in shared._steps} == {
        (kind, size, width) for size in (1, 2) for kind, width in (("extend", 1), ("extend", BLOCK), ("denoise", BLOCK))
    }


def test_warm_up_meets_every_size_of_the_measured_rounds(plan, requests, made, tmp_path, monkeypatch):
    attempts = captures_by_figure(monkeypatch, made)
    run = store.load(speed.run(with_graphs(plan, min_rounds=3), requests, root=tmp_path))
    assert not [event for event in run.events if event["kind"] == "timed_again"]
    [shared] = made
    assert len(shared._steps) == shared.num_made <= shared.max_graphs  # none was given up
    assert sum(sum(counts) for counts in attempts.values()) > 0
    # Round 0 is the warm-up's and the first measured one's.
    assert all(counts[-1] == 0 for counts in attempts.values())
    assert {len(counts) for (_, _, number, _), counts in attempts.items() if number > 0} == {1}


@pytest.mark.parametrize(("warmup_rounds", "temperature"), [(0, 0.0), (1, 1.0)])
def test_a_timing_that_captured_is_taken_again(plan, requests, made, tmp_path, monkeypatch, warmup_rounds, temperature):
    """Sampled answers end elsewhere in every round, so that batches shrink to sizes that no warm-up has met."""
    attempts = captures_by_figure(monkeypatch, made)
    rounds = {"warmup_rounds": warmup_rounds, "min_rounds": 3, "costs": False}
    changed = with_graphs(plan, temperature=temperature, batch_sizes=(3,), num_prompts=6, new_tokens=40, **rounds)
    run = store.load(speed.run(changed, requests, root=tmp_path))
    noted = [event for event in run.events if event["kind"] == "timed_again"]
    measured = [counts for (_, _, number, _), counts in attempts.items() if number >= warmup_rounds]
    assert all(counts[-1] == 0 for counts in measured)
    assert noted
    if warmup_rounds == 0:
        assert len(noted) == sum(len(counts) - 1 for counts in measured)
    [shared] = made
    assert len(shared._steps) == shared.num_made


def test_too_few_graphs_end_in_one_line(plan, requests, made, tmp_path, monkeypatch):
    monkeypatch.setattr(arms_room, "num_sizes", lambda *_: 1)
    with pytest.raises(ValueError, match="every attempt needs CUDA graphs of new sizes"):
        speed.run(with_graphs(plan), requests, root=tmp_path)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    budget=st.integers(1, 20),
    block_size=st.integers(1, 6),
    decoder=st.sampled_from(["autoregressive", "mock_ar", "block_diffusion"]),
)
def test_no_batch_asks_for_more_sizes_than_are_kept(lengths, budget, block_size, decoder, small_pair):
    longest = max(lengths) + budget + block_size
    kept = num_sizes(len(lengths), {1, block_size}, longest)
    small_pair.graphs = small_pair.context_tower.graphs = StepGraphs(max_graphs=kept, widths={1, block_size})
    params = {"block_size": block_size, "threshold": 0.1} if decoder == "block_diffusion" else {}
    prompts = [
        Prompt(id=str(n), token_ids=tuple(4 + (i * 7 + n) % 90 for i in range(length)))
        for n, length in enumerate(lengths)
    ]
    made = make_decoder(small_pair, decoder, **params)
    made.generate(prompts, max_new_tokens=budget, eos_token_ids=tuple(range(4, 30)))
    assert small_pair.graphs.num_made == len(small_pair.graphs._steps) <= kept


@pytest.fixture(scope="module")
def small_pair(pair):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graphs, "MIN_SLOTS", 8)
        yield load_model(pair)


@pytest.mark.parametrize("alone", [True, False])
def test_a_baseline_of_its_own_gets_them_too(alone, pair, plan, requests, made, tmp_path):
    other = write_pair(tmp_path / "other", seed=1)
    if alone:  # the AR base checkpoint
        file = other / "model.safetensors"
        save_file(base_names(load_file(file)), str(file))
    speed.run(with_graphs(plan, baseline=str(other), costs=False), requests, root=tmp_path / "r")
    of_pair, of_baseline = made if alone else reversed(made)  # pairs come first, else the baseline
    assert of_pair is not of_baseline
    assert {key[0] for key in of_pair._steps} == {"extend", "denoise"}
    assert {key[0] for key in of_baseline._steps} == {"extend"}
    if alone:
        assert load_model(other).has_denoiser is False


def test_answers_and_scores_of_a_run_are_the_same(pair, made, tmp_path):
    plain = RunPlan(
        model=str(pair), tasks=("miniature_sort", "miniature_choice"), limit=4, max_new_tokens=12,
        block_sizes=(BLOCK,), batch_size=3, likelihood="denoiser_left_to_right",
    )  # fmt: skip
    runs = [store.load(harness.run(each, root=tmp_path)) for each in (plain, with_graphs(plain))]
    rows = [
        [(r.task, r.doc_id, run.cells[r.cell].arm, r.generation.token_ids) for r in run.generations] for run in runs
    ]
    assert rows[0] == rows[1]
    scores = [[(s.task, s.doc_id, s.metric, s.value) for s in run.scores] for run in runs]
    assert scores[0] == scores[1]
    assert not set(runs[0].cells) & set(runs[1].cells)
    [shared] = made
    # What prompts share is read in pieces of any length: no steps, and not worth a capture.
    assert {key[3] for key in shared._steps} == {1, BLOCK}
    assert len(shared._steps) == shared.num_made
    with pytest.raises(ValueError, match="rows would not be comparable"):
        harness.run(plain, root=tmp_path, resume=runs[1].path)
    text = report.write([runs[1].path], tmp_path / "report").joinpath("report.md").read_text()
    assert "steps: small ones of both arms from CUDA graphs" in text


def test_a_timed_run_goes_on_with_the_same_steps_only(plan, requests, made, tmp_path):
    path = speed.run(with_graphs(plan, workload="fixed"), requests, root=tmp_path)
    with pytest.raises(ValueError, match="rows would not be comparable"):
        speed.run(dataclasses.replace(plan, workload="fixed", min_rounds=3), requests, root=tmp_path, resume=path)
    again = speed.run(with_graphs(plan, workload="fixed", min_rounds=3), requests, root=tmp_path, resume=path)
    assert {sample.round for sample in store.load(again).speed} == {0, 1, 2}


@pytest.mark.parametrize("verb", ["run", "speed"])
def test_a_device_without_graphs_is_refused_before_anything_loads(verb, tmp_path, capsys):
    """The checkpoint is not even there."""
    assert (
        cli.main([verb, "--cuda-graphs", "--devices", "cpu", "--model", "nowhere", "--out", str(tmp_path / "r")]) == 2
    )
    assert "CUDA graphs need CUDA devices: name some with --devices" in capsys.readouterr().err
    assert cli.main([verb, "--cuda-graphs", "--devices", "cuda:0,cpu", "--out", str(tmp_path / "r")]) == 2
    assert "CUDA graphs need CUDA devices" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["run", "speed"])
@pytest.mark.parametrize("arm", ["--baseline", "--model"])
def test_an_arm_that_cannot_have_graphs_is_refused_before_anything_loads(
    verb, arm, pair, tmp_path, capsys, monkeypatch
):
    """In the other arm alone they would be its handicap."""
    foreign = save_tiny("llama", tmp_path / "llama")
    write_tokenizer(foreign)
    capsys.readouterr()
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("loaded"))
    chosen = [arm, str(foreign), *(["--model", str(pair)] if arm == "--baseline" else ["--decoder", "autoregressive"])]
    command = [verb, *chosen, "--tasks", "miniature_sort", "--cuda-graphs", "--devices", "cuda:0"]
    assert cli.main([*command, "--out", str(tmp_path / "r")]) == 2
    said = capsys.readouterr().err
    assert "checkpoint llama is of family transformers" in said
    assert said.count("\n") == 1


def test_blocks_too_large_for_graphs_are_refused_beside_ar_steps_that_are_not(plan, requests, made, tmp_path):
    with pytest.raises(ValueError, match="batch size 2 with blocks of 200 makes steps of 400 tokens"):
        speed.run(with_graphs(plan, block_sizes=(BLOCK, 200)), requests, root=tmp_path)
    assert not made


def test_the_option_is_a_field_of_plan_files(pair, tmp_path, capsys):
    file = tmp_path / "plan.toml"
    file.write_text(f'model = "{pair}"\ncuda_graphs = true\n')
    assert cli.main(["speed", "--plan", str(file)]) == 2
    assert "CUDA graphs need CUDA devices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("devices", "cuda_graphs", "said"),
    [(("cuda:0",), False, True), (("cuda:0",), True, False), (("cpu",), False, False)],
)
def test_a_gpu_without_graphs_is_told_of_them(devices, cuda_graphs, said):
    hint = conditions.hint(SpeedPlan(devices=devices, cuda_graphs=cuda_graphs))
    assert (hint is not None and "without --cuda-graphs" in hint) == said
