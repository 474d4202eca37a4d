"""Is the baseline at its best? Its memory floor, transformers' own ``generate`` beside it, and the gate on that."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_models import save_tiny
from report_fixture import speed_run
from test_claims_judge import FAST, claims_of
from tiny_models import tiny_pair

from twotower_eval import store
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.compare import Runs, SpeedPoint
from twotower_eval.analyse.compare.timing import best_warning
from twotower_eval.analyse.words import finding_text
from twotower_eval.analyse.words.facts import NOT_RECORDED, best_text
from twotower_eval.engine.models import config, load_model
from twotower_eval.measure.speed.clock import CallClock, Devices
from twotower_eval.measure.speed.conditions import _beside_generate, _step_bytes
from twotower_eval.records import BaselineBest, to_json


class Ticking:
    """A clock on which every reading is a second later."""

    s = 0.0

    def __call__(self) -> float:
        self.s += 1.0
        return self.s


def point_with(tmp_path: Path, **facts: Any) -> tuple[store.Run, SpeedPoint]:
    """A scored run in whose events stands what was found of its baseline."""
    run = store.load(speed_run(tmp_path, scored=True))
    baseline = next(cell.id for cell in run.manifest.cells if cell.arm == "baseline")
    plain: dict[str, Any] = {"engine": "transformers", "cuda_graphs": False, "attention": "sdpa", "num_threads": 1}
    best = BaselineBest(cell=baseline, **{**plain, "step_bytes": 12.6e6, "bytes_per_s": 10e9, **facts})
    event = {"at": "t", "kind": "baseline_best", **to_json(best), "files": run.events[-1]["files"]}
    run = dataclasses.replace(run, events=[*run.events, event])
    (point,) = Runs([run]).speed
    return run, point


def test_the_line_says_how_it_was_run_and_how_far_above_its_floor(tmp_path: Path) -> None:
    _, point = point_with(tmp_path, own_s=(1.05,) * 5, generate_s=(1.0,) * 5, same_tokens=True)
    text = best_text(point.best)
    assert "useful tokens/s (batch 1, float32, transformers' model in our loop, sdpa attention, no CUDA graphs" in text
    assert "time to read 12.6 MB a step at 10 GB/s, as a copy does" in text
    assert "; 1.05 [1.05, 1.05] times as long as transformers' own generate" in text
    assert point.best is not None
    assert point.baseline_rate.estimate is not None
    assert point.best.above_floor == pytest.approx(10e9 / 12.6e6 / point.baseline_rate.estimate.value)


@pytest.mark.parametrize(("ratio", "outcome"), [(2.0, "INVALID"), (1.1, "SUPPORTED"), (0.8, "SUPPORTED")])
def test_a_baseline_that_its_own_library_outruns_supports_nothing(tmp_path: Path, ratio: float, outcome: str) -> None:
    """A handicapped baseline was not noticed at all."""
    run, point = point_with(tmp_path, own_s=(ratio,) * 5, generate_s=(1.0,) * 5, same_tokens=True)
    (verdict,) = judge(claims_of(FAST), [run])
    assert verdict.outcome == outcome
    assert point.invalid == (outcome == "INVALID")
    warning = best_warning(point.best)
    assert (warning is not None and warning.kind == "slower_than_generate") == (ratio > 1)
    (allowed,) = judge(claims_of({**FAST, "limits": {"own_generate": 1.0}}), [run])
    assert allowed.outcome == "SUPPORTED"


def test_other_tokens_are_not_compared_and_old_runs_say_that_nothing_was_recorded(tmp_path: Path) -> None:
    run, point = point_with(tmp_path / "other", own_s=(2.0,) * 5, generate_s=(1.0,) * 5, same_tokens=False)
    assert "not compared with transformers' own generate: it gives other tokens" in best_text(point.best)
    assert judge(claims_of(FAST), [run])[0].outcome == "SUPPORTED"
    (old,) = Runs([store.load(speed_run(tmp_path / "old"))]).speed
    assert (old.best, best_text(old.best), best_warning(old.best)) == (None, NOT_RECORDED, None)


def test_transformers_own_generate_is_timed_in_turn_and_gives_our_tokens(tmp_path: Path) -> None:
    model = load_model(save_tiny("llama", tmp_path / "llama"))
    clock = CallClock(Devices(["cpu"]), Ticking())
    found = _beside_generate(model, [(3, 4, 5), (6, 7, 8, 9)], 6, clock)
    assert found == {"own_s": (1.0,) * 5, "generate_s": (1.0,) * 5, "same_tokens": True}


def test_a_step_reads_all_weights_but_an_embedding_of_its_own(tmp_path: Path) -> None:
    model = load_model(save_tiny("llama", tmp_path / "llama"))
    table = model.inner.get_input_embeddings().weight
    whole = sum(weight.numel() for weight in model.inner.parameters())
    tied = model.inner.get_output_embeddings().weight is table
    assert _step_bytes(model, 1, 10) == 4 * (whole - (0 if tied else table.numel()))
    assert _step_bytes(object(), 1, 10) is None
    tower = tiny_pair().context_tower
    step = config.Step(part="ar_step", batch_size=2, num_tokens=1, context_tokens=10, routing="independent")
    assert _step_bytes(tower, 2, 10) == config.step_bytes(step, tower.config, torch.float32.itemsize)


def test_far_above_its_floor_is_a_warning_only_where_a_step_is_not_the_host_s_time(tmp_path: Path) -> None:
    _, tiny = point_with(tmp_path / "tiny", step_bytes=1e6, bytes_per_s=1e12)
    assert tiny.best is not None
    assert (tiny.best.above_floor or 0) > 10
    assert best_warning(tiny.best) is None
    _, large = point_with(tmp_path / "large", step_bytes=1e9, bytes_per_s=1e11)
    assert large.best is not None
    slow = dataclasses.replace(large.best, above_floor=40.0)
    found = finding_text(best_warning(slow))
    assert found == "the baseline takes more than 10 times as long as reading its weights"
