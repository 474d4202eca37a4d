"""Audits of published numbers: those of the shipped claim, word for word, and what would contradict."""

from typing import Any

import pytest

from twotower_eval import cli
from twotower_eval.analyse.claims import audit, audit_code
from twotower_eval.analyse.claims.files import load_claims
from twotower_eval.analyse.claims.published import Published, published_from

GOLDEN = """\
CONFIRMS     headline: stated 98.7 % is the ratio of the unweighted means and fits the mean of per-task ratios of 11 \
tasks: ratio of the unweighted means 98.67 %, mean of per-task ratios 98.65 % (fits: 98.6 to 98.7); \
the means are 79.251 % and 80.318 %
REMARK       multiple choice (5 tasks: MMLU, ARC-Challenge, WinoGrande, RACE, MMLU Global Lite): retention 100.14 %
REMARK       generative (6 tasks: MMLU-Pro, HumanEval, MBPP-Sanitized, GSM8K, MATH-500, MGSM): retention 97.40 %
REMARK       code (2 tasks: HumanEval, MBPP-Sanitized): retention 97.32 %
REMARK       math (2 tasks: GSM8K, MATH-500): retention 96.52 %
REMARK       code + math (4 tasks: HumanEval, MBPP-Sanitized, GSM8K, MATH-500): retention 96.90 %
REMARK       ARC-Challenge: 91.72 % (AR baseline) = 1075/1172, 92.66 % (candidate) = 1086/1172: \
as from one greedy run
REMARK       WinoGrande: 76.09 % (AR baseline) = 964/1267, 76.09 % (candidate) = 964/1267: as from one greedy run
REMARK       HumanEval: 79.27 % (AR baseline) = 130/164: as from one greedy run
REMARK       HumanEval: 75.58 % (candidate), 76.40 % (block 16), 19.85 % (block 64) are no k/164: \
20 samples a problem are the fewest that fit all of them
REMARK       MBPP-Sanitized: 74.71 % (AR baseline) = 192/257: as from one greedy run
REMARK       MBPP-Sanitized: 74.28 % (candidate) is no k/257: 9 samples a problem are the fewest that fit
REMARK       GSM8K: 92.49 % (AR baseline) = 1220/1319, 90.14 % (candidate) = 1189/1319, \
89.84 % (block 16) = 1185/1319, 2.20 % (block 64) = 29/1319: as from one greedy run
REMARK       MATH-500: 84.40 % (AR baseline) = 422/500, 80.60 % (candidate) = 403/500, 2.20 % (block 64) = 11/500: \
as from one greedy run
REMARK       MATH-500: 81.05 % (block 16) is no k/500: 4 samples a problem are the fewest that fit
REMARK       WinoGrande, RACE: identical in both columns: one computation for both models, as of likelihoods of a \
tower that they share, or equal answers, or chance (how often equally good models that err independently of each other \
print the same: WinoGrande 1.9 %)
REMARK       headline: 2.42x on 2 devices against 1 is 1.21x per device
REMARK       block 16 is stated at 2.42x (headline), 2.02x (block-size table): \
they differ in something that is not stated
REMARK       two untied towers against one tied network decoding by diffusion, \
points: general +21.7, code +17.3, math +15.7
REMARK       two untied towers against continued AR training, points: general +4.3, code -2.2, math +6.5
20 findings, 0 of them contradict what is published
"""


def test_the_shipped_claim_is_audited_word_for_word(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["claims", "audit", "nemotron-labs-twotower"]) == 0
    assert capsys.readouterr().out == GOLDEN


def table(**aggregate: Any) -> Published:
    rows = [("one", 50.0, 40.0), ("two", 80.0, 80.0)]
    tasks = [
        {"name": n, "shots": 0, "metric": "acc", "kinds": ["generative"], "baseline": a, "candidate": b}
        for n, a, b in rows
    ]
    stated = {"name": "headline", "decimals": 1, **aggregate}
    return published_from({"decimals": 2, "task": tasks, "aggregate": [stated]})


@pytest.mark.parametrize(
    ("percent", "kind", "code"), [(92.3, "CONFIRMS", 0), (90.0, "CONFIRMS", 0), (95.0, "CONTRADICTS", 3)]
)
def test_an_aggregate_under_no_reading_contradicts(percent: float, kind: str, code: int) -> None:
    """120 / 130 = 92.3 %; the mean of 80 % and 100 % is 90 %; 95 % is neither."""
    findings = audit(table(percent=percent))
    assert findings[0].kind == kind
    assert audit_code(findings) == code


def test_the_reading_that_fits_is_named() -> None:
    assert "is the mean of per-task ratios of 2 tasks" in audit(table(percent=90.0))[0].text
    assert "is the ratio of the unweighted means of 2 tasks" in audit(table(percent=92.3))[0].text


def test_what_contradicts_never_looks_like_what_it_contradicts() -> None:
    """A stated 92.33 % was contradicted by "92.31 %" alone: now also by the ends that 120 / 130 can have."""
    found = audit(table(percent=92.324, decimals=3))[0]
    assert found.kind == "CONTRADICTS"
    assert "stated 92.324 %" in found.text
    assert "the unweighted means 92.3077 % (92.2929 to 92.3225)" in found.text
    assert audit(table(percent=92.312, decimals=3))[0].kind == "FITS"
    stated = [{"name": n, "factor": f, "block_size": 16} for n, f in (("abstract", 2.426), ("table", 2.42))]
    one = {"name": "one", "shots": 0, "metric": "acc", "kinds": [], "baseline": 5.0, "candidate": 5.0}
    apart = audit(published_from({"decimals": 2, "task": [one], "speedup": stated}))[-1].text
    assert apart.startswith("block 16 is stated at 2.426x (abstract), 2.42x (table)")
    stated[0]["factor"] = 2.421  # which 2.42 rounds
    rounded = audit(published_from({"decimals": 2, "task": [one], "speedup": stated}))
    assert not any("block 16" in finding.text for finding in rounded)


def rows_of(decimals: int, *rows: tuple[str, int, float, float], **more: Any) -> list[str]:
    """What is said of granularity: (task, documents, baseline, candidate)."""
    tasks = [
        {"name": name, "shots": 0, "metric": "acc", "kinds": [], "num_documents": n, "baseline": a, "candidate": b}
        for name, n, a, b in rows
    ]
    return [finding.text for finding in audit(published_from({"decimals": decimals, "task": tasks, **more}))]


def test_what_fits_whatever_is_printed_is_no_remark() -> None:
    """One decimal, 1,319 documents: every percentage is some k/1319, and two were called "as from one greedy run"."""
    [text] = rows_of(1, ("GSM8K", 1319, 92.5, 90.1))
    assert text == ("2 checks of granularity at 1 decimal could not have failed and are left out: GSM8K (n = 1319)")
    assert rows_of(2, ("GSM8K", 1319, 92.49, 90.14))[0].endswith(
        "90.14 % (candidate) = 1189/1319: as from one greedy run"
    )
    [missed] = rows_of(2, ("GSM8K", 1319, 92.50, 90.14))[1:]
    assert missed.startswith("GSM8K: 92.50 % (AR baseline) is no k/1319")


@pytest.mark.parametrize(("decimals", "n", "telling"), [(0, 99, True), (0, 100, False), (0, 96, False), (1, 999, True)])
def test_the_remark_ends_where_every_percentage_has_a_count(decimals: int, n: int, telling: bool) -> None:
    """At n = 96 counts halfway between two whole percentages fit both, which leaves none without."""
    said = rows_of(decimals, ("t", n, 50.0, 25.0))
    assert any("could not have failed" in text for text in said) != telling
    assert any(f"/{n}" in text for text in said) == telling


def test_none_and_all_are_possible_of_any_number() -> None:
    texts = rows_of(2, ("t", 164, 100.0, 79.27), ("u", 20_000, 5.0, 4.0))
    assert texts[0] == "t: 79.27 % (candidate) = 130/164: as from one greedy run"
    assert texts[1] == (
        "3 checks of granularity at 2 decimals could not have failed and are left out: t (n = 164), u (n = 20000)"
    )
    assert rows_of(2, ("t", 164, 100.0, 79.27))[1].startswith("1 check of granularity at 2 decimals could not have")


def test_a_number_of_samples_that_makes_everything_fit_explains_nothing() -> None:
    """2 samples of 40 documents leave no whole percentage out, so that they fit says nothing about the samples."""
    text = rows_of(0, ("t", 40, 51.0, 50.0))[0]
    assert "51 % (AR baseline) is no k/40" in text
    assert "are the fewest" not in text
    assert text.endswith("2 samples a problem fit, but with so many every percentage does")


def test_nothing_published_is_nothing_to_audit() -> None:
    with pytest.raises(ValueError, match="numbers to audit"):
        audit(load_claims("miniature").published)


TASK = {"name": "one", "shots": 0, "metric": "acc", "kinds": [], "baseline": 5.0, "candidate": 5}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scores": []}, "unknown key 'scores' (did you mean 'score'?)"),
        ({"score": [{"task": "on", "where": "w", "percent": 1.0}]}, "no task 'on' (did you mean 'one'?)"),
        ({"aggregate": [{"name": "h", "percent": 1.0, "decimals": 1, "kinds": ["code"]}]}, "no task is of kind 'code'"),
        ({"speedup": [{"name": "s", "factor": "2x", "block_size": 16}]}, "factor must be a number"),
        ({"speedup": [{"name": "s", "factor": 0.0, "block_size": 16}]}, "factor must be above 0"),
        ({"speedup": [{"name": "s", "factor": float("nan"), "block_size": 16}]}, "factor must be a finite number"),
        ({"speedup": [{"name": "s", "factor": 2.0, "block_size": 16, "baseline_devices": 0}]}, "baseline_devices must"),
        ({"speedup": 3}, "published: speedup must be a list"),
        ({"score": ["one"]}, "published: score must be a list of tables"),
        ({"score": [{"task": "one", "where": "w", "percent": 101.0}]}, "must be a percentage with 2 decimals"),
        ({"decimals": -1}, "decimals must be from 0 to 9, not -1"),
        ({"decimals": 400}, "decimals must be from 0 to 9, not 400"),
        ({"task": [{**TASK, "baseline": 5.125}]}, "baseline must be a percentage with 2 decimals, as printed, not 5.1"),
        ({"task": [{**TASK, "num_documents": 0}]}, "num_documents must be 1 or more"),
        ({"aggregate": [{"name": "h", "percent": 1.0, "decimals": -400}]}, "decimals must be from 0 to 9"),
    ],
)
def test_published_numbers_are_checked(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        published_from({"decimals": 2, "task": [TASK], **change})
    assert words in str(caught.value)
