"""Audits of published numbers: those of the shipped claim, word for word, and what would contradict."""

from typing import Any

import pytest

from twotower_eval import cli
from twotower_eval.claims import audit, audit_code
from twotower_eval.claims.files import load_claims
from twotower_eval.claims.published import Published, published_from

GOLDEN = """\
CONFIRMS     headline: stated 98.7 % is the ratio of the unweighted means or the mean of per-task ratios of 11 tasks: \
ratio of the unweighted means 98.67 %, mean of per-task ratios 98.65 %; the means are 79.251 % and 80.318 %
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
REMARK       WinoGrande, RACE: identical in both columns, very likely scored by the context tower that both share
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
    """A stated 92.31 % was contradicted by "92.31 %": one decimal too few of 120 / 130 = 92.308 % held to 92.312 %."""
    text = audit(table(percent=92.312, decimals=3))[0].text
    assert "stated 92.312 %" in text
    assert "the unweighted means 92.3077 %" in text
    stated = [{"name": n, "factor": f, "block_size": 16} for n, f in (("abstract", 2.421), ("table", 2.42))]
    one = {"name": "one", "shots": 0, "metric": "acc", "kinds": [], "baseline": 5.0, "candidate": 5.0}
    apart = audit(published_from({"decimals": 2, "task": [one], "speedup": stated}))[-1].text
    assert apart.startswith("block 16 is stated at 2.421x (abstract), 2.42x (table)")


def test_nothing_published_is_nothing_to_audit() -> None:
    with pytest.raises(ValueError, match="nothing to audit"):
        audit(load_claims("miniature").published)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scores": []}, "unknown key 'scores' (did you mean 'score'?)"),
        ({"score": [{"task": "on", "where": "w", "percent": 1.0}]}, "no task 'on' (did you mean 'one'?)"),
        ({"aggregate": [{"name": "h", "percent": 1.0, "decimals": 1, "kinds": ["code"]}]}, "no task is of kind 'code'"),
        ({"speedup": [{"name": "s", "factor": "2x", "block_size": 16}]}, "factor must be a number"),
    ],
)
def test_published_numbers_are_checked(change: dict[str, Any], words: str) -> None:
    task = {"name": "one", "shots": 0, "metric": "acc", "kinds": [], "baseline": 5.0, "candidate": 5}
    with pytest.raises(ValueError, match=r".") as caught:
        published_from({"decimals": 2, "task": [task], **change})
    assert words in str(caught.value)
