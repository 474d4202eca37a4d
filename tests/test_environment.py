"""What is recorded about the machine and the code."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from twotower_eval.plan import VerifyPlan
from twotower_eval.store import environment
from twotower_eval.store.resume import what_differs


def test_facts_are_json_and_stay_the_same_between_calls() -> None:
    facts = environment.describe_machine(("cpu",))
    assert json.loads(json.dumps(facts, allow_nan=False)) == facts == environment.describe_machine(("cpu",))
    assert facts["num_cores"] >= 1
    assert facts["devices"] == [{"device": "cpu"}]


def test_versions_name_what_can_change_results() -> None:
    versions = environment.package_versions()
    assert {"torch", "transformers", "tokenizers", "lm-eval", "evaluate", "sacrebleu", "scikit-learn"} <= set(versions)
    assert "ray" in environment.PACKAGES


def test_asking_imports_no_torch() -> None:
    code = "import sys; from twotower_eval import environment; environment.describe_machine(('cuda:0',)); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("policy", [None, "PASSIVE", "ACTIVE"])
def test_a_run_says_whether_idle_threads_slept(monkeypatch: pytest.MonkeyPatch, policy: str | None) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if policy is not None:
        monkeypatch.setenv("OMP_WAIT_POLICY", policy)
    made = environment.new_manifest(
        "verify", run_id="r", plan=VerifyPlan(model="m"), cells=(), devices=("cpu",), seeds={}
    )
    assert made.omp_wait_policy == policy
    later = dataclasses.replace(made, verb="speed", omp_wait_policy="ACTIVE")
    timed = dataclasses.replace(made, verb="speed")
    differs = ["OMP_WAIT_POLICY was PASSIVE, is ACTIVE"] if policy == "PASSIVE" else []
    assert what_differs(timed, later) == differs, "older runs do not say it, and are resumed as before"


def git(folder: Path, *args: str) -> None:
    command = ["git", "-C", str(folder), "-c", "user.name=a", "-c", "user.email=a@example.org", *args]
    subprocess.run(command, check=True, capture_output=True)


def test_commit_and_dirty_are_those_of_this_checkout_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "checkout" / "twotower_eval"
    (package / "store").mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(package / "store" / "environment.py"))
    assert environment.git_state() == (None, None)
    git(package.parent, "init", "-q")
    (package / "a.py").write_text("1\n")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-qm", "one")
    commit, dirty = environment.git_state()
    assert commit is not None
    assert len(commit) == 40
    assert dirty is False
    (package / "b.py").write_text("2\n")
    assert environment.git_state() == (commit, True)
    # A package installed inside somebody's repository is not that repository.
    inner = package.parent / "venv" / "site-packages" / "twotower_eval"
    inner.mkdir(parents=True)
    monkeypatch.setattr(environment, "__file__", str(inner / "environment.py"))
    assert environment.git_state() == (None, None)


def test_a_report_multiplies_on_one_thread_unless_told_otherwise() -> None:
    """Products of a report are small: a second thread of OpenBLAS doubled its processor time by spinning."""
    code = "import os; from twotower_eval import cli; cli.main(['report', 'nowhere']); "
    code += "print(os.environ['OPENBLAS_NUM_THREADS'])"
    unset = {key: value for key, value in os.environ.items() if key != "OPENBLAS_NUM_THREADS"}
    for given, threads in (({}, "1"), ({"OPENBLAS_NUM_THREADS": "2"}, "2")):
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**unset, **given}
        )
        assert done.stdout.split()[-1] == threads
