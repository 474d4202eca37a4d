"""What a verdict says beside its outcome: the launches that it holds in, what was not checked, and its terms."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from report_fixture import Row, quality_run, speed_run
from test_claims_judge import BOTH, FAST, KEPT, claims_of

from twotower_eval import cli, store
from twotower_eval.analyse.claims import exit_code, judge, strict_line, verdict_lines
from twotower_eval.analyse.claims.match import at_stake, speed_readings
from twotower_eval.analyse.claims.terms import RANGES, claimed_text
from twotower_eval.analyse.compare.gate_facts import Unexplained
from twotower_eval.analyse.compare.timing import speed_points
from twotower_eval.records import Gate, GateKind, GateLimits, SpeedSample, Verdict
from twotower_eval.store import Run

CLAIM_FILE = """title = "mine"
[[point]]
name = "here"
decoder = { kind = "block_diffusion", block_size = 16, steps_per_block = 16, threshold = 0.8, temperature = 0.0 }
batch_size = 1
num_devices = 1
workload = "answer"
[[claim]]
name = "fast"
quantity = "speedup_time"
subject = "pair"
baseline = "context-tower"
point = "here"
expected = 1.2
source = "a test"
"""


@pytest.fixture(scope="module")
def kept_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return store.load(quality_run(tmp_path_factory.mktemp("kept")))


def launched(root: Path, num: int) -> Run:
    """A scored speed run whose 24 rounds are spread over so many launches."""

    def change(row: Row) -> Row:
        return dataclasses.replace(row, launch_id=f"{row.round % num}") if isinstance(row, SpeedSample) else row

    return store.load(speed_run(root, scored=True, num_rounds=24, edit=change))


@pytest.mark.parametrize(
    ("num", "scope"), [(1, "in this launch"), (2, "in these launches"), (4, "in these launches"), (5, None), (6, None)]
)
def test_few_launches_speak_for_themselves_alone(tmp_path: Path, kept_run: Run, num: int, scope: str | None) -> None:
    """A speedup of one process was SUPPORTED without a word of it, though launches differ by more than rounds do."""
    tables = ({**KEPT}, {**FAST, "expected": 1.2}, BOTH)
    kept, fast, both = judge(claims_of(*tables), [kept_run, launched(tmp_path, num)])
    assert (kept.scope, fast.scope, both.scope) == (None, scope, scope)
    assert (kept.num_launches, fast.num_launches, both.num_launches) == (None, num, num)
    assert [one.outcome for one in (kept, fast, both)] == ["SUPPORTED"] * 3
    said = f"SUPPORTED {scope}" if scope else "SUPPORTED"
    lines = verdict_lines(claims_of(*tables), [kept, fast, both])
    assert lines[1].startswith(f"{said:12}  fast")
    assert (f"; holds {scope} only: `twotower-eval speed --launches 5`" in lines[1]) == bool(scope)
    assert both.reason == f"kept SUPPORTED; fast {said}"
    assert exit_code([kept, fast, both]) == 0
    assert exit_code([kept, fast, both], strict=True) == (4 if scope else 0)
    assert bool(strict_line([kept, fast, both])) == (scope is not None)


def test_refuted_says_its_launches_and_a_quality_that_refutes_alone_needs_none(tmp_path: Path, kept_run: Run) -> None:
    runs = [kept_run, launched(tmp_path, 2)]
    _, _, both = judge(claims_of({**KEPT, "expected": 1.2}, FAST, BOTH), runs)
    assert (both.outcome, both.scope) == ("REFUTED", None)
    _, fast, both = judge(claims_of(KEPT, {**FAST, "expected": 3.0}, BOTH), runs)
    assert (fast.scope, both.scope) == ("in these launches", "in these launches")
    assert exit_code([fast], strict=True) == 3, "what is refuted stays so"


def test_a_strict_check_ends_with_4_and_says_why(tmp_path: Path, kept_run: Run, capsys: Any) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(CLAIM_FILE)
    words = ["claims", "check", str(file), str(kept_run.path), str(launched(tmp_path / "few", 2).path)]
    assert cli.main(words) == 0
    assert cli.main([*words, "--strict"]) == 4
    assert "strict: 1 SUPPORTED in fewer than 5 launches counts as inconclusive" in capsys.readouterr().out
    enough = [*words[:-1], str(launched(tmp_path / "enough", 5).path), "--strict"]
    assert cli.main(enough) == 0
    assert "strict" not in capsys.readouterr().out


def test_a_supported_speedup_says_what_it_takes_on_trust() -> None:
    """Gates that could not be checked were silent in the verdict."""
    claims = claims_of(FAST)
    kinds: tuple[GateKind, ...] = ("residual", "verify")
    unknown = [Gate(kind=kind, outcome="not_checked", facts=Unexplained(reasons=("no costs",))) for kind in kinds]
    verdict = Verdict(claim="fast", outcome="SUPPORTED", estimate=None, reason="r", evidence=(), gates=tuple(unknown))
    assert (
        "; not checked: residual (cannot compare times with forwards: no costs)" in verdict_lines(claims, [verdict])[0]
    )
    assert "verify" not in verdict_lines(claims, [verdict])[0]
    refuted = dataclasses.replace(verdict, outcome="REFUTED")
    assert "not checked" not in verdict_lines(claims, [refuted])[0]


def test_the_unchecked_gates_of_a_part_are_said_of_the_joint_claim(
    tmp_path: Path, kept_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower_eval.analyse.claims.text.NAMED_WITH_SPEED", ("verify",))
    claims = claims_of(KEPT, FAST, BOTH)
    verdicts = judge(claims, [kept_run, launched(tmp_path, 5)])
    assert "; not checked: verify (no verify run" in verdict_lines(claims, verdicts)[2]


def test_every_verdict_carries_its_margin_and_the_limits_that_are_its_own(tmp_path: Path, kept_run: Run) -> None:
    """A claim with a margin of its own, or a gate opened wide, read like any other."""
    own = {**FAST, "margin": 0.1, "limits": {"min_retention": 0.3, "null_offset": 0.02}}
    claims = claims_of(
        {**KEPT, "relation": "equal", "margin": 0.0}, own, BOTH, {**KEPT, "name": "far", "expected": 2.0}
    )
    verdicts = judge(claims, [kept_run, launched(tmp_path, 1)])
    kept, fast, both, refuted, _ = verdict_lines(claims, verdicts)
    assert "; claimed: retention equal to 90 %, without a margin" in kept
    limits = "; limits that are not the shipped ones: min_retention 0.3 (shipped 0.5)"
    sped = "wall-clock speedup at least 1.2x (margin 10 %, so at least 1.08x)"
    assert f"; claimed: {sped}{limits}" in fast
    assert f"retention equal to 90 %, without a margin and {sped}{limits}" in both
    assert "; claimed: retention at least 200 % (margin 0.5 points, so at least 199.5 %)" in refuted
    assert "limits" not in kept


def test_every_limit_has_its_range() -> None:
    """A new gate's limit could be set to anything."""
    shipped = GateLimits()
    assert RANGES.keys() == {field.name for field in dataclasses.fields(GateLimits)}
    for name, allowed in RANGES.items():
        assert allowed.least <= getattr(shipped, name) <= allowed.most


@pytest.mark.parametrize(
    ("terms", "words"),
    [
        (
            {"quantity": "retention", "expected": 0.987, "margin": 0.005},
            "retention at least 98.7 % (margin 0.5 points, so at least 98.2 %)",
        ),
        (
            {"quantity": "score", "relation": "equal", "expected": 0.71, "margin": 0.02},
            "score equal to 71 % (margin 2 points, so from 69 % to 73 %)",
        ),
        (
            {"quantity": "score_difference", "expected": -0.01, "margin": 0.005},
            "score difference at least -1 points (margin 0.5 points, so at least -1.5 points)",
        ),
        (
            {"quantity": "score", "relation": "at_most", "metric": "ppl", "expected": 33.3, "margin": 0.5},
            "score (ppl) at most 33.3 (margin 0.5, so at most 33.8)",
        ),
        (
            {"quantity": "speedup_time", "expected": 2.0, "margin": 0.0},
            "wall-clock speedup at least 2x, without a margin",
        ),
    ],
)
def test_a_claim_says_what_its_margin_leaves(terms: dict[str, Any], words: str) -> None:
    """``at least 98.7 % less 0.5 points`` had to be reckoned out."""
    scope = {} if terms["quantity"].startswith("speedup") else {"scope": ["sorting"]}
    [claim] = claims_of({**FAST, **scope, **terms})
    assert claimed_text(claim) == words


@pytest.mark.parametrize(
    ("quantity", "terms", "words"),
    [
        ("score", {"metric": "exact_match", "expected": 0.9, "margin": 0.9}, "every result would support"),
        (
            "score",
            {"metric": "acc", "expected": 0.9, "margin": 0.3},
            "leaves too little of the claim: at most 20 points",
        ),
        ("score", {"metric": "pass@1,none", "expected": 0.9, "margin": 0.3}, "at most 20 points"),
        ("score", {"metric": "prompt_level_strict_acc", "expected": 0.9, "margin": 0.3}, "at most 20 points"),
        ("score", {"expected": 0.2, "margin": 0.2}, "with a margin of 0.2 every result would support the claim"),
        ("score", {"expected": 0.21, "margin": 0.2}, "at most 10.5 points"),
        ("score", {"relation": "at_most", "expected": 0.9, "margin": 0.1}, "every result would support"),
        ("score_difference", {"metric": "acc", "expected": 0.0, "margin": 1.0}, "every result would support"),
        ("score_difference", {"metric": "acc", "expected": 0.0, "margin": 0.3}, "at most 20 points"),
        ("retention", {"expected": 0.06, "margin": 0.05}, "at most 0.6 points"),
        ("retention", {"expected": 0.05, "margin": 0.05}, "every result would support"),
        ("score", {"metric": "word_perplexity", "expected": 0.9, "margin": 0.9}, None),
        ("score", {"relation": "equal", "expected": 0.022, "margin": 0.02}, None),
        ("score", {"expected": 0.4, "margin": 0.2}, None),
        ("score_difference", {"metric": "acc", "expected": 0.0, "margin": 0.2}, None),
        ("retention", {"expected": 0.5, "margin": 0.05}, None),
        ("retention", {"relation": "at_most", "expected": 0.02, "margin": 0.05}, None),
    ],
)
def test_no_margin_leaves_a_claim_that_everything_supports(
    quantity: str, terms: dict[str, Any], words: str | None
) -> None:
    """Naming a metric did away with the limit, and a score could be claimed at 20 % less 20 points."""
    table = {**KEPT, "quantity": quantity, "scope": ["sorting"], **terms}
    if words is None:
        assert claims_of(table)[0].margin == terms["margin"]
        return
    with pytest.raises(ValueError, match="claim 'kept'") as caught:
        claims_of(table)
    assert words in str(caught.value)


def test_a_null_is_held_against_the_calls_speedup_judged_and_claimed(tmp_path: Path) -> None:
    """Per device 0.9x on two devices is 1.8x of the calls, but the null was allowed the width of 0.9x."""
    [point] = speed_points([launched(tmp_path, 1)])[0]
    workload = dataclasses.replace(point.candidate.workload, num_devices=2)
    on_two = dataclasses.replace(point, candidate=dataclasses.replace(point.candidate, workload=workload))
    [claim] = claims_of({**FAST, "quantity": "speedup_time_per_device", "expected": 0.9})
    [reading, *_] = speed_readings(claim, on_two)
    assert reading.estimate is not None
    judged, claimed = at_stake(claim, on_two, reading.estimate)
    assert judged.value == pytest.approx(2 * reading.estimate.value)
    assert claimed == pytest.approx(1.8)
    [plain] = claims_of(FAST)
    assert at_stake(plain, on_two, judged) == (judged, plain.expected)
