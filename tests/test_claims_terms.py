"""What a verdict says beside its outcome: the launches that it holds in, what was not checked, and its terms."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from report_fixture import Row, quality_run, speed_run
from test_claims_judge import BOTH, FAST, KEPT, claims_of

from twotower_eval import cli, store
from twotower_eval.claims import exit_code, gates, judge, strict_line, verdict_lines
from twotower_eval.claims.terms import RANGES
from twotower_eval.records import Gate, GateLimits, SpeedSample, Verdict
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
    """A scored speed run whose six rounds are spread over so many launches."""

    def change(row: Row) -> Row:
        return dataclasses.replace(row, launch_id=f"{row.round % num}") if isinstance(row, SpeedSample) else row

    return store.load(speed_run(root, scored=True, edit=change))


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
    assert "strict: 1 SUPPORTED in fewer than 5 launches is counted as inconclusive" in capsys.readouterr().out
    enough = [*words[:-1], str(launched(tmp_path / "enough", 5).path), "--strict"]
    assert cli.main(enough) == 0
    assert "strict" not in capsys.readouterr().out


def test_a_supported_speedup_says_what_it_takes_on_trust() -> None:
    """Gates that could not be checked were silent in the verdict."""
    claims = claims_of(FAST)
    unknown = [
        Gate(name=name, outcome="not_checked", detail="no costs") for name in (gates.SAID_WITH_SPEED[0], "other")
    ]
    verdict = Verdict(claim="fast", outcome="SUPPORTED", estimate=None, reason="r", evidence=(), gates=tuple(unknown))
    assert "; not checked: residual (no costs)" in verdict_lines(claims, [verdict])[0]
    assert "other" not in verdict_lines(claims, [verdict])[0]
    refuted = dataclasses.replace(verdict, outcome="REFUTED")
    assert "not checked" not in verdict_lines(claims, [refuted])[0]


def test_the_unchecked_gates_of_a_part_are_said_of_the_joint_claim(
    tmp_path: Path, kept_run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("twotower_eval.claims.text.SAID_WITH_SPEED", ("verify",))
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
    assert f"; claimed: wall-clock speedup at least 1.2x less 10 %{limits}" in fast
    assert f"retention equal to 90 %, without a margin and wall-clock speedup at least 1.2x less 10 %{limits}" in both
    assert "; claimed: retention at least 200 % less 0.5 points" in refuted
    assert "limits" not in kept


def test_every_limit_has_its_range() -> None:
    """A new gate's limit could be set to anything."""
    shipped = GateLimits()
    assert RANGES.keys() == {field.name for field in dataclasses.fields(GateLimits)}
    for name, allowed in RANGES.items():
        assert allowed.least <= getattr(shipped, name) <= allowed.most
