"""Plug-ins that behave otherwise when timed, through the harness and the clock, on a pair of random weights."""

import pytest
from tiny_pair import write_pair

from tests.two_faced import KIND, TELLS, TwoFaced
from twotower_eval import store
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.claims.ruling import apart
from twotower_eval.analyse.compare import Runs
from twotower_eval.analyse.words import found_text, kind_text
from twotower_eval.measure import harness, speed, suites
from twotower_eval.plan import RunPlan, SpeedPlan
from twotower_eval.records import Claim, OperatingPoint, Verdict

TASKS, NUM_PROMPTS, BUDGET = ("miniature_sort",), 4, 16


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[store.Run]:
    """Every decoder scored, then timed; only what remembers is given nothing to remember by the run."""
    root = tmp_path_factory.mktemp("two faced")
    common = {"model": str(write_pair(root / "pair")), "tasks": TASKS, "decoder": KIND, "block_sizes": tuple(TELLS)}
    plan = RunPlan(limit=NUM_PROMPTS, max_new_tokens=BUDGET, batch_size=2, **common)  # type: ignore[arg-type]
    scored = harness.run(plan, root=root)
    TwoFaced.known.clear()
    setting = {"num_prompts": NUM_PROMPTS, "batch_sizes": (1,), "min_rounds": 1, "warmup_rounds": 1}
    timed = SpeedPlan(new_tokens=BUDGET, costs=False, threads=1, **setting, **common)  # type: ignore[arg-type]
    requests = suites.build_requests(suites.resolve_tasks(TASKS, limit=NUM_PROMPTS))
    path = speed.run(timed, requests, root=root)
    return [store.load(scored), store.load(harness.score_journal(path))]


def verdicts(runs: list[store.Run]) -> dict[str, Verdict]:
    found = {}
    for cell in (cell for cell in runs[1].manifest.cells if cell.arm == "candidate"):
        point = OperatingPoint(name="here", decoder=cell.decoder, batch_size=1, num_devices=1, workload="answer")
        common = {"subject": cell.checkpoint.name, "baseline": "context-tower", "source": "us", "point": point}
        claims = [
            Claim(name="kept", quantity="retention", scope=TASKS, expected=0.5, margin=0.01, **common),
            Claim(name="fast", quantity="speedup_time", expected=1.0, margin=0.1, **common),
            Claim(name="both", quantity="joint", parts=("kept", "fast"), **common),
        ]
        found[TELLS[int(cell.decoder.params["block_size"] or 0)]] = judge(claims, runs)[-1]
    return found


def gates_of(verdict: Verdict) -> dict[str, str]:
    return {kind_text(gate.kind): gate.outcome for gate in verdict.gates}


def test_a_decoder_that_tells_timed_calls_from_scored_ones_is_found_out(runs: list[store.Run]) -> None:
    """Answers were scored in one run and timed in another, and nobody looked whether they were the same."""
    found = verdicts(runs)
    honest = gates_of(found.pop("nothing"))
    assert honest["same answers"] == honest["one thing"] == honest["same tasks"] == "passed"
    for tell in ("the prompt's text", "its caller", "its options"):
        verdict = found.pop(tell)
        assert verdict.outcome == "INVALID", tell
        assert gates_of(verdict)["same answers"] == "failed"
        assert "candidate: 4 of 4 answers (100 %) differ in float32" in verdict.reason
    remembers = found.pop("what it knows")
    assert not found
    assert remembers.outcome == "INVALID"
    assert "of the forwards that the same answers took when they were scored" in remembers.reason


def test_what_remembers_its_answers_does_not_do_the_same_in_every_round(runs: list[store.Run]) -> None:
    remembers = verdicts(runs)["what it knows"]
    [gate] = [gate for gate in remembers.gates if gate.kind == "same_rounds"]
    assert gate.outcome == "failed"
    assert "document 0 in its forwards" in found_text(gate)


def test_quality_and_speed_of_the_honest_one_may_be_said_in_one_sentence(runs: list[store.Run]) -> None:
    found = Runs(runs)
    for key, cell in found.points.items():
        quality, speed_point = found.quality_at(key), found.speed_at(key)
        assert quality is not None
        assert speed_point is not None
        reasons = apart(runs, quality, speed_point)
        assert (not reasons) == (TELLS[int(cell.decoder.params["block_size"] or 0)] == "nothing")
