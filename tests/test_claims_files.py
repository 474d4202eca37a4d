"""Claim files: what they hold reaches the records, and every fault is one line that says where."""

import copy
from pathlib import Path
from typing import Any

import pytest

from twotower_eval.analyse.claims import files
from twotower_eval.analyse.claims.files import ClaimFile, claims_from, load_claims, select
from twotower_eval.records import GateLimits
from twotower_eval.resources import data_path

POINT = {
    "name": "p",
    "decoder": {"kind": "block_diffusion", "block_size": 16, "steps_per_block": "auto", "threshold": 0.8},
    "batch_size": 1,
    "num_devices": 2,
    "workload": "answer",
}
COMMON = {"subject": "pair", "baseline": "context-tower", "point": "p", "source": "a test"}
RETENTION = {"name": "kept", "quantity": "retention", "scope": ["a", "b"], "expected": 0.987, **COMMON}
SPEEDUP = {"name": "fast", "quantity": "speedup_time", "expected": 2.42, **COMMON}
JOINT = {"name": "both", "quantity": "joint", "parts": ["kept", "fast"], **COMMON}
WHOLE: dict[str, Any] = {"title": "t", "point": [POINT], "claim": [RETENTION, SPEEDUP, JOINT]}


def changed(where: str, index: int, drop: str | None = None, **changes: Any) -> dict[str, Any]:
    values = copy.deepcopy(WHOLE)
    values[where][index].update(changes)
    if drop:
        del values[where][index][drop]
    return values


def test_a_file_becomes_records() -> None:
    found = claims_from("x", WHOLE)
    kept, fast, both = found.claims
    assert kept.margin == 0.005
    assert fast.margin == 0.05
    assert (both.parts, both.expected, both.margin) == (("kept", "fast"), None, None)
    assert kept.point is fast.point
    assert kept.point.decoder.params == {"block_size": 16, "steps_per_block": 16, "threshold": 0.8}
    assert kept.limits == GateLimits()
    assert found.published is None
    narrow = claims_from("x", changed("claim", 1, limits={"null_offset": 0.01, "min_retention": 0.8}))
    assert narrow.claims[1].limits == GateLimits(null_offset=0.01, min_retention=0.8)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({**WHOLE, "claims": []}, "unknown key 'claims' (did you mean 'claim'?)"),
        ({"title": "t"}, "neither a [[claim]] nor [published] numbers"),
        ({key: WHOLE[key] for key in ("point", "claim")}, "title is missing"),
        (changed("claim", 0, expectd=1.0), "claim 'kept': unknown key 'expectd' (did you mean 'expected'?)"),
        (changed("claim", 0, quantity="retentoin"), "unknown quantity 'retentoin' (did you mean 'retention'?)"),
        (changed("claim", 0, relation="above"), "unknown relation 'above'"),
        (changed("claim", 0, point="q"), "no [[point]] is named 'q'"),
        (changed("claim", 0, drop="scope"), "scope is missing"),
        (changed("claim", 0, drop="expected"), "claim 'kept': expected is missing"),
        (changed("claim", 0, expected=float("nan")), "claim 'kept': expected must be a finite number, not nan"),
        (changed("claim", 1, limits={"null_offset": float("nan")}), "null_offset must be a finite number, not nan"),
        (changed("claim", 1, margin=1.0), "claim 'fast': a margin of 100 leaves too little of the claim: at most 20 %"),
        (changed("claim", 1, margin=0.57), "a margin of 57 leaves too little of the claim: at most 20 %"),
        (changed("claim", 0, margin=0.06), "a margin of 6 leaves too little of the claim: at most 5 points"),
        (changed("claim", 0, expected=0.04, margin=0.05), "with a margin of 0.05 every result would support the claim"),
        (
            changed("claim", 1, limits={"min_retention": -1.0}),
            "claim 'fast', limits: min_retention must be between 0",
        ),
        (changed("claim", 1, limits={"null_offset": 0.5}), "null_offset must be between 0 and 0.2 (shipped: 0.02)"),
        (changed("claim", 1, limits={"degenerate_share": 1.0}), "degenerate_share must be between 0 and 0.25"),
        (changed("claim", 1, limits={"min_length_ratio": 0.0}), "min_length_ratio must be between 0.5 and 1"),
        (changed("claim", 1, limits={"max_length_ratio": 100.0}), "max_length_ratio must be between 1 and 2"),
        (changed("claim", 1, limits={"null_half_width": 9.0}), "null_half_width must be between 0 and 0.5"),
        (changed("claim", 1, limits={"null_share": 50.0}), "null_share must be between 0 and 5"),
        (changed("claim", 0, drop="source"), "source is missing"),
        (changed("claim", 0, expected="much"), "expected must be a number, not 'much'"),
        (changed("claim", 0, expected=True), "expected must be a number, not True"),
        (changed("claim", 0, margin=-0.1), "margin must be 0 or more"),
        (changed("claim", 0, scope=["a", "a"]), "scope must be a list of different texts"),
        (changed("claim", 0, name="fast"), "'fast' is defined twice"),
        (changed("claim", 1, scope=["a"]), "scope has no effect on a speedup"),
        (changed("claim", 1, averaging="mean_of_ratios"), "averaging has no effect on a speedup"),
        (changed("claim", 1, expected=0), "a speedup of 0"),
        (changed("claim", 1, limits={"min_retenton": 1.0}), "unknown key 'min_retenton'"),
        (changed("claim", 2, expected=1.0), "expected belongs to the parts"),
        (changed("claim", 2, parts=["kept", "slow"]), "no claim is named 'slow', its part"),
        (changed("claim", 2, parts=[]), "a joint claim names its parts"),
        (changed("claim", 0, parts=["fast"]), "a joint claim names its parts"),
        (changed("claim", 1, subject="other"), "part 'fast' has another subject"),
        (changed("point", 0, drop="batch_size"), "point 'p' lacks batch_size"),
        (changed("point", 0, workload="fast"), "workload must be fixed or answer"),
        (changed("point", 0, decoder={"block_size": 16}), "kind is missing"),
        (changed("point", 0, decoder="fast"), "decoder must be a table"),
        ({**WHOLE, "published": {"decimals": 2}}, "[[published.task]]"),
    ],
)
def test_faults_are_one_line_that_says_where(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        claims_from("x", values)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_throughput_means_nothing_where_all_make_the_same_number_of_tokens() -> None:
    values = changed("claim", 1, quantity="speedup_throughput")
    values["point"][0]["workload"] = "fixed"
    with pytest.raises(ValueError, match="claim speedup_time"):
        claims_from("x", values)


def test_files_are_found_by_path_or_shipped_name(tmp_path: Path) -> None:
    assert load_claims("miniature").name == "miniature"
    (tmp_path / "broken.toml").write_text("title = ")
    with pytest.raises(ValueError, match=r"broken\.toml is not valid TOML"):
        load_claims(tmp_path / "broken.toml")
    with pytest.raises(ValueError, match="neither a file nor a shipped claim file"):
        load_claims(tmp_path / "none.toml")


def shipped() -> list[ClaimFile]:
    return [load_claims(path) for path in sorted(data_path("tasks", "claims").glob("*.toml"))]


def test_shipped_claims_name_their_source_and_a_whole_point() -> None:
    files = shipped()
    assert {file.name for file in files} == {"miniature", "nemotron-labs-twotower"}
    for claim in (claim for file in files for claim in file.claims):
        assert "2026-" in claim.source, "a source says when the claim was written"
        assert {"block_size", "steps_per_block", "threshold", "temperature"} <= claim.point.decoder.params.keys()


def test_select_keeps_the_files_order() -> None:
    claims = claims_from("x", WHOLE).claims
    assert [claim.name for claim in select(claims, ["both", "kept"])] == ["kept", "both"]
    assert select(claims, []) == claims
    with pytest.raises(ValueError, match="did you mean 'fast'"):
        select(claims, ["fats"])


SCOPED = {
    "title": "t",
    "point": [{"name": "p", "decoder": {"kind": "autoregressive"}}],
    "claim": [
        {"name": "c", "quantity": "retention", "subject": "m", "baseline": "context-tower", "point": "p",
         "expected": 0.9, "source": "here"}
    ],
}  # fmt: skip


def scope_of(*names: str) -> tuple[str, ...]:
    values: Any = copy.deepcopy(SCOPED)
    values["claim"][0]["scope"] = list(names)
    return claims_from("here", values).claims[0].scope


def test_a_suite_in_a_scope_is_its_tasks() -> None:
    """The suite's name was taken for a task, of which nothing is ever measured."""
    tasks = scope_of("miniature")
    assert {"miniature_sort", "miniature_choice"} <= set(tasks)
    assert "miniature_perplexity" not in tasks  # cannot be part of a retention
    assert scope_of("miniature_sort", "miniature") == ("miniature_sort", *(t for t in tasks if t != "miniature_sort"))
    assert len(scope_of("paper-11")) == 11
    assert scope_of("some_task_of_lm_eval", "mmlu_pro") == ("some_task_of_lm_eval", "mmlu_pro")


def test_a_task_named_almost_like_one_of_a_suite_is_no_slip() -> None:
    """lm-eval's Italian part of Global MMLU was refused: "did you mean global_mmlu_lite?"."""
    names = ("global_mmlu_it", "gsm8kk", "miniature_srot", "humaneval_pluss")
    assert scope_of(*names) == names
    assert files.meant_tasks(("gsm8k", "miniature_srot", "some_task")) == {"miniature_srot": "miniature_sort"}


@pytest.mark.parametrize(("name", "near"), [
    ("miniatur", "miniature"), ("minature", "miniature"), ("paper_11", "paper-11"),
])  # fmt: skip
def test_a_slip_in_a_scope_is_refused_with_what_was_meant(name: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"scope: no suite is named '{name}' \(did you mean '{near}'"):
        scope_of(name)
