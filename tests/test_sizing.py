"""Costs on random weights: what is refused, what is timed, how it is resumed, what the report makes of it.

Time is a count of the layers that were run, so that every figure has a known true value.
"""

import dataclasses
import importlib
import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import report_fixture as made
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.tiny_models import SIZES
from twotower_eval import cli, plan_fields, store
from twotower_eval.analyse import report
from twotower_eval.analyse.compare.figures import measured
from twotower_eval.analyse.compare.sizing import SizingRun, fit_layers, round_draws, round_estimate
from twotower_eval.analyse.report.provenance import plan_of
from twotower_eval.engine.models import graphs
from twotower_eval.engine.models.config import parse_config
from twotower_eval.engine.models.graphs import use_graphs
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.measure import sizing
from twotower_eval.measure.sizing import card
from twotower_eval.measure.sizing.card import make_card, measured_layers, refuse_if_too_large
from twotower_eval.measure.sizing.items import even_profile, recorded_profiles
from twotower_eval.measure.sizing.pairs import build_random_pair
from twotower_eval.measure.sizing.run import config_file
from twotower_eval.measure.speed import conditions
from twotower_eval.measure.speed.conditions import DevicePeak
from twotower_eval.plan import SizingPlan
from twotower_eval.progress import SilentProgress
from twotower_eval.records import CommitStep, Estimate, Generation, canonical_json, sha256_text, verb_of
from twotower_eval.resources import data_path
from twotower_eval.store.journal import close_run

sizing_module = importlib.import_module("twotower_eval.measure.sizing.run")
RELEASED_NAME = "nemotron-labs-twotower-30b-a3b"
REPOSITORY = Path(__file__).parents[1]
PATTERN = "MEM*EMEM*EME"
LAYER_S = {"M": 1.0, "E": 2.0, "*": 5.0}
HEAD_S = 3.0
EMBED_S = 0.5


class Ticks:
    """Seconds that pass when a layer or a head runs: thrice as many for several tokens a row as for one."""

    def __init__(self):
        self.s = 0.0

    def __call__(self):
        return self.s

    def attach(self, pair):
        for part in (pair.context_tower, pair.denoiser):
            for layer in part.tower.layers:
                layer.register_forward_pre_hook(self._passing(LAYER_S[layer.kind]))
            part.tower.embeddings.register_forward_pre_hook(self._passing(EMBED_S, whatever=True))
            # A head of few rows is a bare product; the norm before it runs as often.
            part.tower.norm_f.register_forward_pre_hook(self._passing(HEAD_S))
        return pair

    def _passing(self, seconds, whatever=False):
        def pass_time(_module, inputs):
            several = not whatever and inputs[0].ndim == 3 and inputs[0].shape[1] > 1
            self.s += seconds * (3 if several else 1)

        return pass_time


@pytest.fixture
def ticks(monkeypatch):
    clock = Ticks()
    monkeypatch.setattr(
        sizing_module, "build_random_pair", lambda *args, **options: clock.attach(build_random_pair(*args, **options))
    )
    return clock


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "small.config.json"
    file.write_text(json.dumps(SIZES | {"hybrid_override_pattern": PATTERN, "max_position_embeddings": 4096}))
    return str(file)


@pytest.fixture
def plan(config):
    return SizingPlan(
        config=config, block_sizes=(8,), batch_sizes=(1, 2), prompt_tokens=5, tokens_per_nfe=(2.0, 3.0),
        repeats=3, min_rounds=2, dtype="float32", threads=1,
    )  # fmt: skip


def measure(plan, tmp_path, ticks, **options):
    return store.load(sizing.run(plan, root=tmp_path / "results", now=ticks, **options))


def layers_s(pattern):
    return sum(LAYER_S[kind] for kind in pattern)


def seconds_of(run, **wanted):
    found = [s.wall_s / s.num_repeats for s in run.costs if all(getattr(s, k) == v for k, v in wanted.items())]
    assert found
    return set(found)


def test_a_round_times_every_part_at_every_forced_routing(plan, tmp_path, ticks):
    run = measure(plan, tmp_path, ticks)
    assert run.complete
    whole = layers_s(PATTERN)
    assert seconds_of(run, part="ar_step") == {whole + HEAD_S + EMBED_S}
    assert seconds_of(run, part="denoise") == {3 * (whole + HEAD_S) + EMBED_S}
    assert seconds_of(run, part="context_pass") == {3 * whole + EMBED_S}
    assert seconds_of(run, part="prefill") == {3 * whole + HEAD_S + EMBED_S}
    for profile in (even_profile(2.0, 8, 3), even_profile(3.0, 8, 3)):
        expected_s = (3 * (whole + HEAD_S) + EMBED_S) * profile.num_steps / 3 + 3 * whole + EMBED_S
        found = seconds_of(run, part="forced_block", num_steps=profile.num_steps)
        assert all(value == pytest.approx(expected_s) for value in found)
    touched = {s.routing: s.num_experts_touched for s in run.costs if s.part == "denoise" and s.batch_size == 1}
    assert touched["shared"] == 2 < touched["half"] <= touched["independent"] <= 8
    assert all(s.num_experts_touched == 2 for s in run.costs if s.part == "ar_step" and s.batch_size == 1)
    per_round = {(s.phase, s.round) for s in run.costs}
    assert per_round == {("warmup", 0), ("measure", 0), ("measure", 1)}


def test_layers_that_were_not_built_are_extrapolated_exactly(plan, tmp_path, ticks):
    whole = SizingRun(measure(dataclasses.replace(plan, batch_sizes=(1,)), tmp_path, ticks))
    cut = SizingRun(measure(dataclasses.replace(plan, batch_sizes=(1,), layers=8), tmp_path, ticks))
    assert (whole.extrapolated, cut.extrapolated) == (False, True)
    assert cut.held_out == PATTERN[:4]
    for ours, true in zip(cut.steps, whole.steps, strict=True):
        assert (ours.part, ours.routing) == (true.part, true.routing)
        assert ours.seconds.estimate.value == pytest.approx(true.seconds.estimate.value)
        assert ours.extrapolated
    item = ("denoise", 0, 1, 8, "half", None)
    assert all(abs(error) < 1e-9 for error in cut.fit_residuals(item).values())
    [point], [true] = cut.points, whole.points
    whole_s, block = layers_s(PATTERN), 8
    left_s = whole_s + HEAD_S + EMBED_S - (3 * whole_s + EMBED_S) / block
    expected = (3 * (whole_s + HEAD_S) + EMBED_S) / left_s
    for curve in (*point.curves, *true.curves):
        assert curve.break_even.estimate.value == pytest.approx(expected)
    assert all(abs(b.residual) < 1e-9 for b in (*point.blocks, *true.blocks))
    assert whole.nulls[1].estimate.value == 1.0


@pytest.mark.parametrize(
    ("low", "high", "words", "invalid"),
    [
        (0.99, 1.01, "it holds 1", False),
        (1.0, 1.22, "is known to +-9.9 % only", False),
        (1.05, 1.3, "**INVALID**: off by more than 2.0 %", True),
    ],
)
def test_a_null_that_is_off_marks_what_the_costs_say(plan, tmp_path, ticks, monkeypatch, low, high, words, invalid):
    """Break-even was quoted with no mark while the AR step timed against itself was 10 % off."""
    monkeypatch.setattr(SizingRun, "nulls", dict.fromkeys((1, 2), measured(lambda: null_between(low, high))))
    measure(plan, tmp_path, ticks)
    [folder] = store.find_runs(tmp_path / "results")
    markdown = (report.write([folder], tmp_path, sections=["sizing"]) / "report.md").read_text(encoding="utf-8")
    assert words in markdown
    assert ("**INVALID**: see the A/A null" in markdown) is invalid


def null_between(low: float, high: float) -> Estimate:
    middle = (low * high) ** 0.5
    return Estimate(value=middle, low=low, high=high, level=0.99, n=5, method="a test", seed=None)


class Stops(SilentProgress):
    """Interrupts after so many items."""

    def __init__(self, after):
        self.left = after

    @contextmanager
    def track(self, total, description):
        def advance(*_args):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

        yield advance


def test_a_torn_round_is_begun_anew(plan, tmp_path, ticks):
    plan = dataclasses.replace(plan, batch_sizes=(1,), warmup_rounds=0)
    num_items = 3 + 3 * (2 + 2)
    with pytest.raises(KeyboardInterrupt):
        measure(plan, tmp_path, ticks, progress=Stops(num_items + 4))
    [folder] = store.find_runs(tmp_path / "results")
    assert len(store.load(folder).costs) == num_items + 4
    assert len(SizingRun(store.load(folder)).rounds) == 1
    run = measure(plan, tmp_path, ticks, resume=folder)
    assert run.complete
    assert sorted({(s.launch_id[-1], s.round) for s in run.costs}) == [("1", 0), ("1", 1), ("2", 2)]
    assert len(SizingRun(run).rounds) == 2


def test_a_run_without_a_whole_round_says_so_in_its_report(plan, tmp_path, ticks):
    with pytest.raises(KeyboardInterrupt):
        measure(plan, tmp_path, ticks, progress=Stops(3))
    [folder] = store.find_runs(tmp_path / "results")
    text = (report.write([folder], tmp_path, sections=["sizing"]) / "report.md").read_text()
    assert "has no complete measured round yet" in text


def test_what_does_not_fit_is_refused_after_its_card(plan, tmp_path, ticks, monkeypatch):
    monkeypatch.setattr(conditions, "free_memory", lambda device: (100_000, None))
    notes = []
    progress = SilentProgress()
    monkeypatch.setattr(progress, "note", notes.append)
    with pytest.raises(ValueError, match=r"needs about .* take more memory, .*: no number of layers fits"):
        measure(plan, tmp_path, ticks, progress=progress)
    assert "RANDOM WEIGHTS" in next(note for note in notes if not note.startswith("auto: "))
    assert any(line.startswith("floor of denoise, batch 2, block 8, half experts") for line in notes)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("step", "words"),
    [
        ("prefill", "out of memory while building"),
        ("denoise", "(forced_block|denoise), batch .: out of memory: take smaller"),
    ],
)
def test_memory_that_runs_out_is_one_line_wherever_it_does(plan, tmp_path, ticks, monkeypatch, step, words):
    """Only building weights and the clocked repetitions were looked after; contexts and a part's first step, which
    comes before the clock, gave a traceback."""

    def full(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(TwoTower, step, full)
    with pytest.raises(ValueError, match=words):
        measure(plan, tmp_path, ticks)


RELEASED = "tasks/configs/nemotron-labs-twotower-30b-a3b.config.json"


@pytest.mark.parametrize("free_gib", [200, 70, 40, 22, 10, 2])
def test_what_a_refusal_proposes_is_not_refused_in_its_turn(free_gib, monkeypatch):
    """On a laptop with 22 GiB free the released size was answered with "take --share-towers, a second device or
    --layers 7": shared towers need 62 GiB, and a guess at the layers could be fewer than show every kind."""
    config = parse_config(json.loads(data_path(*RELEASED.split("/")).read_text()))
    free = DevicePeak(device="cpu", dtype="bfloat16", bytes_per_s=1e10, flops_per_s=1e11, free_bytes=free_gib << 30,
                 free_reason=None)  # fmt: skip

    def refusal(**changes):
        plan = SizingPlan(config="released.json", **changes)
        parts = measured_layers(config.pattern, plan.layers)
        patterns = ["".join(config.pattern[i] for i in part) for part in parts]
        made = make_card(plan, config, patterns, [free], torch.bfloat16)
        try:
            refuse_if_too_large(made, plan, config, torch.bfloat16)
        except ValueError as error:
            return str(error)
        return None

    said = refusal()
    assert (said is None) == (free_gib == 200)
    if said is None:
        return
    assert "second device" not in said  # there is but one CPU
    assert ("no number of layers fits" in said) == (free_gib == 2)
    for way in said.partition(": take ")[2].split(" or ") if "--" in said else ():
        words = way.split()
        layers = int(words[-1]) if "--layers" in words else None
        shared = "--share-towers" in words
        assert refusal(layers=layers, share_towers=shared) is None
        if layers is not None:  # and no more would do
            assert refusal(layers=layers + 1, share_towers=shared) is not None


def test_memory_that_a_system_does_not_tell_is_bounded_by_what_it_has(monkeypatch):
    """Without /proc/meminfo (macOS) free memory was unknown, so that 118 GiB of weights were begun on any laptop."""

    def missing(self, **_options):
        raise FileNotFoundError(self)

    monkeypatch.setattr(conditions.Path, "read_text", missing)
    num_bytes, reason = conditions.free_memory("cpu")
    assert num_bytes is not None
    assert num_bytes >= 1 << 28
    assert "if nothing else" in reason
    monkeypatch.delattr(conditions.os, "sysconf")
    assert conditions.free_memory("cpu") == (None, "the system does not tell how much memory is free")


def test_a_card_is_read_without_exponents_and_zeros():
    """A small model's card said "weights 0.0 GiB", the released one's on a CPU "1.1e+03 ms"."""
    assert [card._size(n) for n in (512, 3 << 20, 118 << 30)] == ["0.5 KiB", "3.0 MiB", "118.0 GiB"]
    assert [card._milliseconds(s) for s in (5.41e-5, 0.0123456, 1.1)] == ["0.0541 ms", "12.3 ms", "1100 ms"]


def test_the_command_line_measures_and_reports(config, tmp_path, capsys):
    out = ["--out", str(tmp_path / "results")]
    small = [
        "--prompt-tokens",
        "5",
        "--repeats",
        "2",
        "--min-rounds",
        "2",
        "--block-sizes",
        "4,8",
        "--layers",
        "6",
        "--threads",
        "1",
    ]
    assert cli.main(["size", config, "--dtype", "float32", *small, *out]) == 0
    run = capsys.readouterr().out.strip()
    assert cli.main(["report", run, "--out", str(tmp_path / "reports")]) == 0
    text = (tmp_path / "reports" / run.rsplit("/", 1)[-1] / "report.md").read_text()
    assert text.startswith("# What decoding would cost: small (random weights)")
    assert re.findall("^## (.*)$", text, re.MULTILINE) == [
        "Costs of a model's size, on random weights",
        "Environment: what was run on what",
        "How to reproduce it",
    ]
    assert re.search(
        r"\*\*Batch 1, blocks of 4: break-even at (([\d.]+|no rate)[ /]*){3} tokens per NFE\*\* \(shared", text
    )
    assert not re.search(r"2\.42x (at|needs)", text), "no claim is about this config"
    section = text.partition("## Costs of a model's size, on random weights")[2].partition("\n## ")[0]
    section = section.partition("<details><summary>Words used")[0]
    paragraphs = [part for part in section.split("\n\n") if part.strip() and not part.lstrip().startswith(("|", "-"))]
    assert all("andom weights" in part for part in paragraphs)
    assert "6 of 12 layers a tower" in section
    assert "extrapolated 2.0-fold" in section
    assert "| 4 | half |" in section
    assert cli.main(["size", "--resume", run, "--min-rounds", "3"]) == 0
    assert {s.round for s in store.load(tmp_path / "results" / run.rsplit("/", 1)[-1]).costs} == {0, 1, 2}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["size"], "name the config.json whose size is to be measured"),
        (["size", "CONFIG", "--layers", "3"], "the first 3 layers (MEM) have no * layer"),
        (["size", "CONFIG", "--layers", "99"], "the config has 12 layers"),
        (["size", "CONFIG", "--tokens-per-nfe", "20"], "20 tokens per NFE do not fit into blocks of 16"),
        (["size", "CONFIG", "--share-towers", "--devices", "cpu,cpu:0"], "on one device"),
        (["size", "CONFIG", "--devices", "tpu"], "tpu"),
        # Were a KeyError with its traceback, 'mps' what a newcomer on an Apple laptop tries first.
        (["size", "CONFIG", "--devices", "mps"], "device 'mps' cannot be used here"),
        (["size", "CONFIG", "--devices", "meta"], "cannot wait for a device of type 'meta'"),
        # Was measured, for as long as it took.
        (["size", "CONFIG", "--prompt-tokens", "100000000"], "tokens at most"),
        (["size", "CONFIG", "--cuda-graphs"], "CUDA graphs need CUDA devices"),
        (["size", "no.json"], "shipped are nemotron-labs-twotower-30b-a3b"),
        (["size", "CONFIG", "--tasks", "arc"], "No such option: --tasks"),
        (["size", "CONFIG", "--profile", "no run"], "'no run' is no run"),
        (["speed", "--layers", "3"], "--layers belongs to --random-weights"),
        (["speed", "--random-weights", "CONFIG", "--tasks", "arc"], "--tasks has no use for random weights"),
        # Was named --costs, which nobody had given.
        (["speed", "--random-weights", "CONFIG", "--no-costs"], "--no-costs has no use for random weights"),
        (["speed", "--random-weights", "CONFIG", "--layers", "99"], "the config has 12 layers"),
        (["speed", "--random-weights", ""], "name the config.json"),
    ],
)
def test_bad_requests_are_one_line(arguments, words, config, tmp_path, capsys):
    arguments = [config if word == "CONFIG" else word for word in arguments]
    assert cli.main([*arguments, "--out", str(tmp_path / "results")]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


def test_the_released_size_by_its_name_on_a_small_machine_is_one_line_that_helps(tmp_path, capsys, monkeypatch):
    """Was to be named by a path inside the package. What is proposed is no more than what fits."""
    monkeypatch.setattr(conditions, "free_memory", lambda device: (16 << 30, None))
    assert cli.main(["size", RELEASED_NAME, "--out", str(tmp_path / "results")]) == 2
    *card, error = capsys.readouterr().err.splitlines()
    assert card.pop(0).startswith("auto: device cpu")
    assert card[0].startswith(f"cost card of {RELEASED_NAME}: RANDOM WEIGHTS, 52 of 52 layers")
    assert error.startswith(f"error: {RELEASED_NAME} with 52 layers needs about 123.8 GiB on cpu, which has 16.0 GiB")
    assert error.endswith("take --layers 6 or --share-towers --layers 13")
    assert not (tmp_path / "results").exists()


def test_a_file_comes_before_a_shipped_config_of_its_name(tmp_path, monkeypatch):
    assert config_file(RELEASED_NAME) == data_path("tasks", "configs", f"{RELEASED_NAME}.config.json")
    monkeypatch.chdir(tmp_path)
    (tmp_path / RELEASED_NAME).write_text("{}")
    assert config_file(RELEASED_NAME).read_text() == "{}"


@pytest.mark.parametrize(("prompt_tokens", "num_slots"), [(4, 1), (20, 2)])
def test_contexts_that_outgrow_their_slots_cost_no_captures_in_the_rounds(
    config, tmp_path, monkeypatch, prompt_tokens, num_slots
):
    """Graphs were counted as if contexts never grew: where repetitions crossed a power of two, steps were given up
    and captured anew in every round, on the clock."""
    monkeypatch.setattr(plan_fields, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "GRAPH_DEVICES", ("cpu",))
    monkeypatch.setattr(graphs, "MIN_SLOTS", 32)
    made = []
    monkeypatch.setattr(sizing_module, "use_graphs", lambda *args: made.append(use_graphs(*args)))
    plan = SizingPlan(
        config=str(config), dtype="float32", block_sizes=(4,), prompt_tokens=prompt_tokens, repeats=4,
        tokens_per_nfe=(2.0,), min_rounds=2, cuda_graphs=True,
    )  # fmt: skip
    run = store.load(sizing.run(plan, root=tmp_path))
    assert not [event for event in run.events if event["kind"] == "timed_again"]
    assert all(len(each._steps) == each.num_made <= each.max_graphs for each in made)
    assert {key[4] for each in made for key in each._steps} == {32 << doubled for doubled in range(num_slots)}


@pytest.mark.parametrize("verb", ["size", "speed"])
@pytest.mark.parametrize("key", ["config", "random_weights"])
def test_a_plan_file_may_be_about_a_size_also_by_its_older_key(verb, key, config, tmp_path, capsys):
    file = tmp_path / "plan.toml"
    file.write_text(f'{key} = "{config}"\nlayers = 40\n')
    assert cli.main([verb, "--plan", str(file)]) == 2
    told = capsys.readouterr().err
    assert ("unknown key 'config'" if (verb, key) == ("speed", "config") else "the config has 12 layers") in told


ALIAS = "speed --random-weights CONFIG is an alias of: twotower-eval size CONFIG"
ROUND = ["--prompt-tokens", "5", "--repeats", "1", "--min-rounds", "2", "--block-sizes", "4", "--threads", "1"]


def test_speed_on_random_weights_is_an_alias_that_says_so(config, tmp_path, capsys):
    """The same plan, the same verb in the manifest, the same cells, and one line that tells of the alias. The config is
    named by its folder, as a checkpoint has it."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(Path(config).read_text())
    assert config_file(str(folder)) == folder / "config.json"
    config = f"{folder}/"
    out = ["--out", str(tmp_path / "results"), "--dtype", "float32", *ROUND, "--tokens-per-nfe", "2"]
    told = []
    for words in (["size", config], ["speed", "--random-weights", config]):
        assert cli.main([*words, *out]) == 0
        told.append(capsys.readouterr())
    runs = [store.load(Path(said.out.strip())) for said in told]
    assert runs[0].manifest.plan == runs[1].manifest.plan
    assert [run.manifest.verb for run in runs] == ["size", "size"]
    assert [cell.id for cell in runs[0].manifest.cells] == [cell.id for cell in runs[1].manifest.cells]
    assert [run.manifest.run_id.split("-")[1] for run in runs] == ["size", "size"]
    lines = [said.err.splitlines() for said in told]
    assert lines[1][0] == ALIAS
    assert ALIAS not in lines[0]
    assert {cell.checkpoint.name for run in runs for cell in run.manifest.cells} == {"checkpoint (random weights)"}
    assert cli.main(["speed", "--resume", str(runs[0].path), "--min-rounds", "3"]) == 0
    assert ALIAS in capsys.readouterr().err
    assert len(SizingRun(store.load(runs[0].path)).rounds) == 3


def as_it_was(run, folder):
    """The run as one was stored when ``speed`` made them and ``random_weights`` named the config."""
    shutil.copytree(run.path, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    older = {"random_weights": manifest["plan"].pop("config"), **manifest["plan"]}
    manifest |= {"verb": "speed", "plan": older, "run_id": folder.name}
    manifest["plan_sha256"] = sha256_text(canonical_json(older))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    close_run(folder, store.FILES)
    return store.load(folder)


def test_runs_of_before_the_verb_are_told_shown_and_resumed(plan, tmp_path, ticks):
    run = measure(dataclasses.replace(plan, batch_sizes=(1,)), tmp_path, ticks)
    older = as_it_was(run, tmp_path / "older" / "20261125T000000Z-speed-aaaaaa")
    assert (older.manifest.verb, verb_of(older.manifest)) == ("speed", "size")
    assert plan_of(older.manifest.verb, older.manifest.plan) == plan_of("size", run.manifest.plan)
    texts = []
    for each in (run, older):
        folder = report.write([each.path], tmp_path / "reports", sections=["sizing", "reproduce"])
        texts.append((folder / "report.md").read_text().replace(each.manifest.run_id, "RUN"))
    assert texts[0] == texts[1]
    more = measure(dataclasses.replace(plan, batch_sizes=(1,), min_rounds=3), tmp_path, ticks, resume=older.path)
    assert more.complete
    assert len(SizingRun(more).rounds) == 3


def test_a_sizing_run_is_not_the_newest_timed_one(plan, tmp_path, ticks):
    """A size that was measured last stood in the place of the run of speed, whose report then had no speedup."""
    run = measure(dataclasses.replace(plan, batch_sizes=(1,)), tmp_path, ticks)
    root = tmp_path / "results"
    older = as_it_was(run, root / "20991125T000000Z-speed-aaaaaa")
    timed = made.speed_run(root)
    assert store.find_runs(root, "speed") == [timed]
    assert set(store.find_runs(root, "size")) == {run.path, older.path}
    text = (report.write(store.find_runs(root), tmp_path) / "report.md").read_text(encoding="utf-8")
    assert "random weights" not in text.partition("\n")[0]
    assert "## Costs of a model's size, on random weights" in text


def test_a_real_run_is_no_sizing_run_to_go_on_with(tmp_path, capsys):
    timed = made.speed_run(tmp_path)
    assert cli.main(["size", "--resume", str(timed)]) == 2
    assert "is a 'speed', not a 'size': twotower-eval speed --resume" in capsys.readouterr().err


@given(st.integers(2, 40), st.integers(1, 12), st.floats(1, 40))
def test_even_profiles_commit_whole_blocks_at_the_rate(block_size, num_blocks, rate):
    if rate > block_size:
        with pytest.raises(ValueError, match="tokens per denoiser call"):
            even_profile(rate, block_size, num_blocks)
        return
    profile = even_profile(rate, block_size, num_blocks)
    assert all(sum(block) == block_size and min(block) >= 1 for block in profile.blocks)
    assert len(profile.blocks) == num_blocks
    assert abs(profile.num_steps - num_blocks * block_size / rate) <= 0.5


def traced(commits):
    return tuple(
        CommitStep(block=0, step=j, positions=tuple(range(n)), token_ids=(1,) * n, confidences=(0.5,) * n, num_forced=0)
        for j, n in enumerate(commits)
    )


def generation(trace, **changes):
    values = {
        "prompt_id": "p", "token_ids": (), "text": None, "finish": "length", "num_prompt_tokens": 1, "num_tokens": 8,
        "num_discarded_tokens": 0, "num_context_forwards": 2, "num_denoiser_forwards": 5, "trace": trace,
    }  # fmt: skip
    return Generation(**(values | changes))


@dataclasses.dataclass
class Row:
    cell: str
    generation: Generation


def recorded(run, *generations):
    """The run with these generations in its candidate cell of block size 8."""
    cell = next(cell.id for cell in run.manifest.cells if cell.decoder.params.get("block_size") == 8)
    return dataclasses.replace(run, generations=[Row(cell, g) for g in generations])


def test_profiles_are_recorded_from_traces_or_else_from_counts(plan, tmp_path, ticks):
    run = measure(plan, tmp_path, ticks)
    [profile] = recorded_profiles(recorded(run, generation(traced([1, 5, 2]))), 8, 4, 0)
    assert profile.blocks == ((1, 5, 2),) * 4
    [profile] = recorded_profiles(recorded(run, generation(None)), 8, 50, 0)
    assert set(profile.blocks) == {(4, 4), (2, 3, 3)}
    assert run.manifest.run_id in profile.name
    with pytest.raises(ValueError, match=r"has no denoised block of 4 tokens .* it has blocks of 8"):
        recorded_profiles(run, 4, 1, 0)
    with pytest.raises(ValueError, match="has no denoised block of 8 tokens"):
        recorded_profiles(recorded(run), 8, 1, 0)


def test_parts_of_the_layers_tell_the_kinds_apart():
    assert measured_layers("MEM*", None) == ((0, 1, 2, 3),)
    assert measured_layers("MEM*", 4) == ((0, 1, 2, 3),)
    parts = measured_layers(PATTERN, 8)
    patterns = ["".join(PATTERN[i] for i in part) for part in parts]
    assert patterns == ["MEM*EMEM", "MEMEMEM", "MM*EMM", "EM*EEM", "MEM*", ""]
    kinds, _ = fit_layers(patterns, np.ones((1, len(patterns))))
    assert set(kinds) == set("ME*")
    with pytest.raises(ValueError, match="cannot tell 3 kinds of layers apart"):
        fit_layers(["ME*", "MEME**"], np.ones((1, 2)))


def test_intervals_over_rounds_hold_what_they_are_about():
    seconds_RF = np.array([[1.0, 2.0], [1.2, 2.4], [0.8, 1.6]])
    draws_QF = round_draws(seconds_RF, seed=0)
    assert draws_QF[0] == pytest.approx([1.0, 2.0])
    assert draws_QF[:, 1] == pytest.approx(2 * draws_QF[:, 0])  # rounds are drawn alike for all
    estimate = round_estimate(draws_QF[:, 0], num_rounds=3, seed=0)
    assert (estimate.value, estimate.n) == (pytest.approx(1.0), 3)
    assert estimate.low < 0.95 < 1.05 < estimate.high
    with pytest.raises(ValueError, match="one round gives no interval"):
        round_estimate(draws_QF[:, 0], num_rounds=1, seed=0)


def test_a_speedup_out_of_reach_has_a_reason(plan, tmp_path, ticks):
    """Here a block's context pass alone costs more than three eighths of its AR steps, so that 2.42x needs too much."""
    run = measure(dataclasses.replace(plan, batch_sizes=(1,)), tmp_path, ticks)
    [point] = SizingRun(run).points
    assert {curve.needed for curve in point.curves} == {None}
    [point] = SizingRun(run, 2.42).points
    assert {curve.needed.estimate for curve in point.curves} == {None}
    assert all("a block of 8 committed in one pass gives only" in curve.needed.reason for curve in point.curves)


def test_costs_on_random_weights_are_held_against_the_claim_about_their_size(tmp_path):
    """2.42x, a constant, stood in every such report, whatever the model and the claim."""
    [run] = (REPOSITORY / "results" / "published").glob("nemotron*/*-speed-*")
    text = (report.write([run], tmp_path / "a", sections=["sizing"]) / "report.md").read_text()
    assert "2.42x needs, tokens per NFE" in text
    assert "2.42x on these random weights: what claim speedup says of its model." in text
    own = tmp_path / "own.toml"
    own.write_text(
        """title = "Ours"
[[point]]
name = "p"
decoder = { kind = "block_diffusion", block_size = 16, steps_per_block = 16, threshold = 0.8 }
batch_size = 1
num_devices = 1
workload = "answer"
[[claim]]
name = "quick"
quantity = "speedup_time"
subject = "any"
baseline = "context-tower"
point = "p"
expected = 1.75
source = "a test"
"""
    )
    other = (report.write([run], tmp_path / "b", sections=["sizing"], claims=str(own)) / "report.md").read_text()
    assert "1.75x needs, tokens per NFE" in other
    assert "2.42x needs" not in other


def test_a_published_size_has_the_figures_that_it_was_published_with(tmp_path):
    """Word for word but for what may be renamed: every number of the committed report, in its order."""
    [run] = (REPOSITORY / "results" / "published").glob("nemotron*/*-speed-*")
    committed = REPOSITORY / "reports" / "published" / run.parent.name / "report.md"
    made_now = report.write([run], tmp_path) / "report.md"
    # By its older name a section is found as well.
    older = report.write([run], tmp_path / "older", sections=["scale", "setup", "reproduce"]) / "report.md"
    assert older.read_text(encoding="utf-8") == made_now.read_text(encoding="utf-8")
    figures = [re.findall(r"\d[\d.,]*", file.read_text(encoding="utf-8")) for file in (committed, made_now)]
    assert len(figures[0]) > 300
    assert figures[0] == figures[1]


def test_a_probe_finds_a_device_that_does_something():
    found = conditions.device_peak("cpu", torch.float32)
    assert 1e8 < found.bytes_per_s < 1e13
    assert 1e8 < found.flops_per_s < 1e15
    assert found.free_bytes is None or found.free_bytes > 0
