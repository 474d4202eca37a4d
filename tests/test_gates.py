"""A timed point has one set of gates: claims are judged by it, and reports mark as INVALID what it does not pass."""

import ast
import dataclasses
import typing
from pathlib import Path

import pytest
from report_fixture import speed_run
from test_claims_judge import FAST, claims_of

import twotower_eval
from twotower_eval import store
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.claims.text import unchecked_text
from twotower_eval.analyse.report.gates import gates as gates_section
from twotower_eval.analyse.report.speed_tables import speed
from twotower_eval.analyse.report.verdicts import JudgedRuns, headline
from twotower_eval.records import GateKind

PACKAGE = Path(twotower_eval.__file__).parent


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    return store.load(speed_run(tmp_path_factory.mktemp("gates"), scored=True))


def waiting(run: store.Run) -> store.Run:
    """The baseline is busy for a third of its time."""
    rows = []
    for one in run.speed:
        cpu_s = one.wall_s / (3 if run.cells[one.cell].arm == "baseline" else 1)
        rows.append(dataclasses.replace(one, cpu_s=cpu_s, caller_cpu_s=cpu_s, off_clock_s=0.0))
    machine = {**run.manifest.machine, "num_threads": 1}
    return dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, machine=machine), speed=rows)


def otherwise(run: store.Run) -> store.Run:
    """The candidate's tokens of the last round are not those of the first."""
    last, rows = max(one.round for one in run.speed), []
    for one in run.speed:
        prompts = one.prompts
        if one.round == last and run.cells[one.cell].arm == "candidate":
            prompts = tuple(dataclasses.replace(prompt, tokens_sha256="0a" * 32) for prompt in prompts)
        rows.append(dataclasses.replace(one, prompts=prompts))
    return dataclasses.replace(run, speed=rows)


def contradicting(run: store.Run) -> store.Run:
    return dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, plan_sha256="0" * 64))


@pytest.mark.parametrize(
    ("change", "kind"),
    [(waiting, "busy_arms"), (otherwise, "same_rounds"), (contradicting, "files_agree"), (None, None)],
)
def test_what_the_judge_calls_invalid_is_marked_so_in_reports(
    run: store.Run, change: typing.Any, kind: GateKind | None
) -> None:
    """The report left out busy arms, rounds that differ and contradictions, and quoted the speedup unmarked."""
    runs = JudgedRuns([run if change is None else change(run)])
    (point,) = runs.speed
    (verdict,) = judge(claims_of(FAST), runs)
    failed = {gate.kind for gate in verdict.gates if gate.outcome == "failed"}
    assert {gate.kind for gate in point.gates if gate.outcome == "failed"} == failed
    assert [gate.kind for gate in point.gates] == [gate.kind for gate in verdict.gates]
    assert (kind is None) == (not failed)
    assert kind is None or kind in failed
    assert point.invalid == (verdict.outcome == "INVALID") == ("**INVALID**" in speed(runs).markdown)
    assert point.invalid == ("(INVALID, see below)" in headline(runs).markdown)
    if kind is not None:
        name = kind.replace("_", " ")
        assert any(
            line.startswith(f"| {name}") and "FAILED" in line for line in gates_section(runs).markdown.split("\n")
        )


def test_a_supported_speedup_says_that_its_arms_were_not_looked_at(run: store.Run) -> None:
    """The list of what is said had a name that no gate has."""
    (verdict,) = judge(claims_of(FAST), [run])
    assert verdict.outcome == "SUPPORTED"
    assert "busy arms (how busy the processor was is not recorded" in unchecked_text(verdict)


def test_every_kind_of_gate_is_made_somewhere() -> None:
    files = [PACKAGE / "analyse" / "compare" / name for name in ("gates.py", "same.py", "witness.py")]
    files.append(PACKAGE / "analyse" / "claims" / "ruling.py")
    made: set[str] = set()
    for path in files:
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        gates = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "Gate"]
        values = [word.value for call in gates for word in call.keywords if word.arg == "kind"]
        made |= {str(value.value) for value in values if isinstance(value, ast.Constant)}
    made |= {"effect_on_scores", "drawn_answers"}  # by whether tokens are drawn: see tests/test_same.py
    assert made == set(typing.get_args(GateKind))
