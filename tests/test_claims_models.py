"""A claim is judged on runs of its own two models: the subject, and the very baseline that it names."""

import dataclasses
from pathlib import Path
from typing import Literal

import pytest
import report_fixture as made
from test_claims_judge import FAST, claims_of

from twotower_eval import store
from twotower_eval.analyse import report
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.claims.match import gather, is_about, names_subject, speed_at
from twotower_eval.analyse.report.verdicts import shipped_claims
from twotower_eval.records import Checkpoint, sha256_text

OTHER = {"name": "other", "source": "other", "digest": sha256_text("other")}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> store.Run:
    return store.load(made.speed_run(tmp_path_factory.mktemp("models"), scored=True))


def with_models(run: store.Run, baseline: dict[str, str], candidate: dict[str, str]) -> store.Run:
    """The same run, its arms said to be of other checkpoints."""
    changes = {"baseline": baseline, "candidate": candidate}

    def renamed(checkpoint: Checkpoint, arm: str) -> Checkpoint:
        return dataclasses.replace(checkpoint, **changes[arm])  # type: ignore[arg-type]

    cells = tuple(dataclasses.replace(c, checkpoint=renamed(c.checkpoint, c.arm)) for c in run.manifest.cells)
    return dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, cells=cells))


def test_the_context_tower_of_another_pair_is_not_the_claims_baseline(run: store.Run) -> None:
    """Any context tower was taken for the subject's own: the claim was SUPPORTED against another model."""
    (claim,) = claims_of(FAST)
    assert is_about(claim, [run])
    assert judge([claim], [run])[0].outcome == "SUPPORTED"
    other = with_models(run, OTHER, {})
    assert not is_about(claim, [other])
    assert speed_at(claim, gather([run]))
    assert not speed_at(claim, gather([other]))
    assert judge([claim], [other])[0].outcome != "SUPPORTED"


COMMIT = "0123456789abcdef" + "0" * 24


def of_hub(at: str = "", tower: Literal["context"] | None = None) -> Checkpoint:
    """A checkpoint of the hub as load_model names it; ``at``: the revision that was asked for."""
    name = "org/name@" + at[:8] if at == COMMIT else "org/name" + (f"@{at}" if at else "")
    source = "hf://org/name" + (f"@{at}" if at else "")
    return Checkpoint(
        name=name, source=source, revision=COMMIT, family="llama", digest="f" * 64, dtype="float32", devices=("cpu",),
        tower=tower,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("subject", "at", "fits"),
    [
        ("org/name", "", True),
        ("org/name", "v1", True),
        ("org/name", COMMIT, True),
        ("org/name@v1", "v1", True),
        ("org/name@v1", "v10", False),
        ("org/name@v10", "v1", False),
        ("org/name@v2", "v1", False),
        ("org/name@v1", "", False),
        (f"org/name@{COMMIT}", "", True),
        (f"org/name@{COMMIT[:8]}", "v1", True),
        (f"org/name@{COMMIT[:7]}", "v1", False),
        ("org/name@fedcba98", "v1", False),
        ("org/name@", "v1", False),
        ("org/nam", "v1", False),
        ("name", "v1", False),
    ],
)
def test_a_claim_on_a_name_is_about_its_revisions_unless_it_names_one(subject: str, at: str, fits: bool) -> None:
    (claim,) = claims_of({**FAST, "subject": subject})
    assert names_subject(claim, of_hub(at)) is fits
    (claim,) = claims_of({**FAST, "subject": f"{subject} (context tower)"})
    assert names_subject(claim, of_hub(at, "context")) is fits
    assert not names_subject(claim, of_hub(at)), "the whole pair is another model"


def test_a_folder_with_such_a_name_is_no_revision() -> None:
    (claim,) = claims_of({**FAST, "subject": "org/name"})
    assert not names_subject(claim, dataclasses.replace(of_hub("v1"), source="runs/org/name@v1"))


def test_runs_of_a_revision_are_judged_by_a_claim_on_the_name(run: store.Run) -> None:
    table = {**FAST, "subject": "org/name"}
    at_v1 = {"name": "org/name@v1", "source": "hf://org/name@v1", "revision": COMMIT}
    renamed = with_models(run, at_v1, at_v1)
    assert judge(claims_of(table), [renamed])[0].outcome == "SUPPORTED"
    assert judge(claims_of({**table, "subject": "org/name@v1"}), [renamed])[0].outcome == "SUPPORTED"
    assert judge(claims_of({**table, "subject": "org/name@v2"}), [renamed])[0].outcome == "NOT_MEASURED"
    baseline = {**table, "subject": "pair", "baseline": "org/name"}
    assert is_about(claims_of(baseline)[0], [with_models(run, at_v1, {})])


def test_shipped_claims_are_not_taken_for_runs_with_another_baseline(run: store.Run) -> None:
    own = {"name": "miniature", "source": "miniature"}
    found = shipped_claims([with_models(run, own, own)])
    assert found is not None
    assert found.name == "miniature"
    assert shipped_claims([with_models(run, OTHER, own)]) is None


def test_a_report_says_in_one_line_whose_the_claims_are(tmp_path: Path) -> None:
    own = {"name": "miniature", "source": "miniature"}
    plain = store.load(made.speed_run(tmp_path / "plain", scored=True))
    changed = with_models(plain, OTHER, own)
    rows = [*changed.speed, *changed.generations, *changed.scores]
    path = made.write(tmp_path / "changed", changed.manifest, rows)
    text = (report.write([path], tmp_path / "a", sections=["claims"]) / "report.md").read_text(encoding="utf-8")
    assert (
        "The shipped claims are about other models (miniature against context-tower), so none of them is judged."
        in text
    )
    given = report.write([path], tmp_path / "b", sections=["claims"], claims="miniature")
    text = (given / "report.md").read_text(encoding="utf-8")
    assert "About other models than these runs have (miniature against context-tower): published-retention, " in text
    assert "SUPPORTED" not in text.replace("NOT SUPPORTED", "")
