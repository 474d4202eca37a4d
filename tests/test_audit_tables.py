"""Audits against tables of known truth: what rounding can explain never contradicts, what it cannot always does."""

import itertools
import random
import tomllib
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP
from fractions import Fraction
from typing import Any

import audit_tables
import pytest

from twotower_eval import cli
from twotower_eval.analyse import stats
from twotower_eval.analyse.claims import audit, audit_code, recomputed
from twotower_eval.analyse.claims.files import load_claims
from twotower_eval.analyse.claims.published import published_from

FILES = sorted(audit_tables.FOLDER.glob("*.toml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_committed_tables(path: Any) -> None:
    """Ten that make no mistake, ten of which one summary cannot be: the public case among them."""
    assert audit_code(audit(load_claims(path).published)) == (3 if path.stem.startswith("contradictory") else 0)


def test_the_committed_tables_are_those_of_the_generator() -> None:
    assert {path.name: path.read_text(encoding="utf-8") for path in FILES} == audit_tables.committed()
    assert len(FILES) == 20


def contradicted(table: audit_tables.Table) -> list[str]:
    published = published_from(table)
    found = [*recomputed.aggregates(published), *recomputed.speedups(published)]  # nothing else can contradict
    return [finding.text for finding in found if finding.kind == "CONTRADICTS"]


def test_no_honest_table_is_contradicted() -> None:
    """Up to 84 % of honest tables with one decimal were: the summary was made again from the printed figures."""
    for seed in range(500):
        assert contradicted(audit_tables.honest(seed)) == [], seed


def test_what_lies_just_outside_is_found() -> None:
    """One summary of each table, moved to the next figure that no value inside the intervals gives."""
    for seed in range(200):
        found = contradicted(audit_tables.moved(seed))
        assert len(found) == 1, seed


def test_the_public_case(capsys: pytest.CaptureFixture[str]) -> None:
    """183.33 / 50.36 tokens per second are 3.64x; 3.47x was stated."""
    assert cli.main(["claims", "audit", str(audit_tables.FOLDER / "contradictory_10.toml")]) == 3
    text = capsys.readouterr().out
    assert text.startswith("CONTRADICTS  headline: stated 3.47x, recomputed 183.33 / 50.36 tokens/s 3.640x\n")


TASK = {"name": "one", "shots": 0, "metric": "acc", "kinds": ["generative"]}


def texts(table: dict[str, Any]) -> list[str]:
    return [f"{finding.kind} {finding.text}" for finding in audit(published_from(table))]


def test_a_text_says_its_own_decimals_and_a_column_has_its_own() -> None:
    """98.70 and 98.7 are one number in TOML and two figures in print."""
    row = {**TASK, "baseline": "50.00", "candidate": "40.0"}
    for percent, kind in (("80.1", "FITS"), ("80.20", "CONTRADICTS"), ("80.11", "FITS"), ("80", "CONFIRMS")):
        found = texts({"task": [row], "aggregate": [{"name": "h", "percent": percent}]})
        assert found[0].startswith(f"{kind} h: stated {percent} %")
    numbers = {**TASK, "baseline": 50.0, "candidate": 40.0}
    columns = {"baseline_decimals": 2, "candidate_decimals": 1}
    stated = [{"name": "h", "percent": 80.11, "decimals": 2}]
    found = texts({"decimals": 3, **columns, "task": [numbers], "aggregate": stated})
    assert found[0].startswith("FITS h: stated 80.11 % fits the ratio of the unweighted means or the mean of per-task")
    assert "ratio of the unweighted means 80.000 % (fits: 79.89 to 80.11)" in found[0]


def test_averages_by_documents_are_a_reading() -> None:
    rows = [
        {**TASK, "name": "small", "num_documents": 100, "baseline": "50.00", "candidate": "25.00"},
        {**TASK, "name": "large", "num_documents": 300, "baseline": "50.00", "candidate": "50.00"},
    ]
    weighted = [{"name": "h", "percent": "87.5"}, {"name": "c", "of": "candidate", "percent": "43.75"}]
    found = texts({"task": rows, "aggregate": weighted})
    assert "is the ratio of the document-weighted means or the document-weighted mean of per-task" in found[0]
    assert "CONFIRMS c: stated 43.75 % is the document-weighted mean of the candidate's column" in found[1]
    unknown = [{key: value for key, value in row.items() if key != "num_documents"} for row in rows]
    [first, *_] = texts({"task": unknown, "aggregate": weighted})
    assert first.startswith("CONTRADICTS h")
    assert "not tried weighted by documents, as num_documents is missing for small, large" in first


def test_digits_that_were_cut_off_are_named_and_no_excuse() -> None:
    """A mean of 33.0 % and 16.0 % is at most 24.55 % if they were rounded, and up to 24.60 % if they were cut off."""
    rows = [{**TASK, "name": n, "baseline": "50.0", "candidate": c} for n, c in (("a", "33.0"), ("b", "16.0"))]
    [found, *_] = texts({"task": rows, "aggregate": [{"name": "h", "of": "candidate", "percent": "24.58"}]})
    assert found.startswith("CONTRADICTS h")
    assert "it would fit had all figures been cut off instead of rounded" in found


def test_speedups_out_of_rates_and_of_other_speedups() -> None:
    rates = [
        {"name": "ours", "tokens_per_s": 200.0, "decimals": 1, "devices": 2, "batch_size": 8},
        {"name": "theirs", "tokens_per_s": "50.0", "devices": 1, "batch_size": 1},
    ]
    speedups = [
        {"name": "both", "factor": 4.0, "of": ["ours", "theirs"]},
        {"name": "each", "percent_faster": 100, "of": ["ours", "theirs"]},
        {"name": "kernel", "factor": "1.50"},
        {"name": "all", "factor": "6.00", "product_of": ["both", "kernel"]},
        {"name": "too much", "factor": "6.50", "product_of": ["both", "kernel"]},
        {"name": "upside down", "factor": "0.25", "of": ["ours", "theirs"]},
    ]
    found = texts({"rate": rates, "speedup": speedups})
    assert "CONFIRMS both: stated 4.0x is 200.0 / 50.0 tokens/s 4.00x, per device, on 2 and 1 of them 2.00x" in found
    assert any(one.startswith("CONFIRMS each: stated 2.00x is") for one in found)
    assert "FITS all: stated 6.00x fits the product of 4.0x, 1.50x 6.000x (fits: 5.91 to 6.10)" in found
    assert any(one.startswith("CONTRADICTS too much: stated 6.50x") for one in found)
    assert any(one.startswith("CONTRADICTS upside down") and "in the other order" in one for one in found)
    assert any("batch 8 against batch 1" in one for one in found)
    assert any("on 2 devices against 1 is 2.00x per device" in one for one in found)


def test_equal_columns_have_several_explanations() -> None:
    """Of a task that is answered in words no tower that both share can have scored both."""
    rows = [
        {**TASK, "name": "written", "num_documents": 100, "baseline": "50.0", "candidate": "50.0"},
        {**TASK, "name": "picked", "kinds": ["multiple_choice"], "baseline": "70.0", "candidate": "70.0"},
    ]
    found = [one for one in texts({"task": rows}) if "identical" in one]
    assert found[0].startswith("REMARK picked: identical in both columns: one computation for both models")
    assert found[1].startswith("REMARK written: identical in both columns: equal answers, or one column copied")
    assert found[1].endswith("print the same: written 5.6 %)")


def test_the_chance_of_equal_figures_is_that_of_the_definition() -> None:
    from scipy.stats import binom

    pmf = binom.pmf(range(101), 100, 0.5)
    assert stats.chance_of_equal(50.0, 2, 100) == pytest.approx(float((pmf**2).sum()))
    by_ten = sum(float(pmf[[k for k in range(101) if round(k, -1) == ten]].sum()) ** 2 for ten in range(0, 101, 10))
    assert stats.chance_of_equal(50.0, -1, 100) == pytest.approx(by_ten)


@pytest.mark.parametrize("n", [7, 16, 96, 99, 164, 999, 1319])
@pytest.mark.parametrize("decimals", [0, 1])
def test_the_share_of_percentages_that_fit(n: int, decimals: int) -> None:
    steps = 10 ** (decimals + 2)
    fitting = [bool(stats.possible_counts(step / 10**decimals, decimals, n)) for step in range(steps + 1)]
    assert stats.share_possible(decimals, n) == pytest.approx(sum(fitting) / len(fitting))
    assert stats.can_misfit(decimals, n) == (not all(fitting))


def test_a_count_that_most_figures_have_is_no_sign_of_one_run() -> None:
    """7 of 10 percentages with one decimal are some k/700: that one is says nothing. One that is none still does."""
    rows = [{**TASK, "num_documents": 700, "baseline": "50.0", "candidate": "40.0"}]
    found = texts({"task": rows})
    assert not any("greedy" in one for one in found)
    assert any("2 checks of granularity at 1 decimal could hardly have failed" in one for one in found)
    misfit = next(k / 10 for k in range(1, 1000) if not stats.possible_counts(k / 10, 1, 700))
    rows[0]["candidate"] = f"{misfit:.1f}"
    assert any(f"{misfit:.1f} % (candidate) is no k/700" in one for one in texts({"task": rows}))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"task": [{**TASK, "baseline": 0.79, "candidate": 0.75}]}, "no score is above 1 %: write shares of 1 as perc"),
        ({"task": [{**TASK, "baseline": 101.5, "candidate": 50.0}]}, "scores in other units than percent are left out"),
        ({"task": [{**TASK, "baseline": "-3.0", "candidate": "5.0"}]}, "baseline must be a percentage from 0 to 100"),
        ({"decimals": None, "task": [{**TASK, "baseline": 5.0, "candidate": "5.0"}]}, "say with how many decimals bas"),
        ({"aggregate": [{"name": "h", "percent": "90", "of": "median"}]}, "of must be retention or baseline or"),
        ({"aggregate": [{"name": "h", "percent": "-1"}]}, "percent must be 0 or more, not -1"),
        ({"speedup": [{"name": "s", "factor": "2", "of": ["a", "b"]}]}, "published speedup 's', of: no rate 'a'"),
        ({"speedup": [{"name": "s", "factor": "2", "percent_faster": 3}]}, "say the same: keep the one that was pri"),
        ({"speedup": [{"name": "s", "factor": "2", "product_of": ["s"]}]}, "product_of: no speedup 's'"),
        ({"rate": [{"name": "r", "tokens_per_s": "0"}]}, "tokens_per_s must be above 0"),
        ({"rate": [{"name": "r", "tokens_per_s": 5}, {"name": "r", "tokens_per_s": 6}]}, "rate 'r' is defined twice"),
        ({"rate": [{"name": "r", "tokens_per_s": "5 tok/s"}]}, "must be a number, as printed, not '5 tok/s'"),
    ],
)
def test_one_clear_line_for_what_cannot_be_audited(change: dict[str, Any], words: str) -> None:
    plain = {"decimals": 2, "task": [{**TASK, "baseline": 5.0, "candidate": 5.0}], **change}
    with pytest.raises(ValueError, match=r".") as caught:
        published_from({key: value for key, value in plain.items() if value is not None})
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_ends_of_an_average_are_reached() -> None:
    """Every figure at its end gives the end of the interval, and the honest truth lies inside."""
    table = tomllib.loads((audit_tables.FOLDER / "honest_03.toml").read_text(encoding="utf-8"))["published"]
    low, high = audit_tables._ends(table, "retention")
    row = next(one for one in table["aggregate"] if one["of"] == "retention")
    for end, away in ((low, -1), (high, 1)):
        row["percent"] = f"{float(end):.9f}"
        assert not contradicted(table)
        row["percent"] = f"{float(end + away * Fraction(2, 10**9)):.9f}"
        assert len(contradicted(table)) == 1


def once_rounded(seed: int, decimals: int, by_documents: bool, of: str, stated: bool) -> audit_tables.Table:
    """An honest table whose summary is of means that were rounded before they were divided or subtracted."""
    rng = random.Random(seed)
    rounding = rng.choice((ROUND_HALF_EVEN, ROUND_HALF_UP))
    tasks, exact = [], []
    for number in range(rng.randint(2, 11)):
        n = rng.choice(audit_tables.SIZES)
        right = rng.randint(n // 5, n - 1)
        counts = {"baseline": right, "candidate": min(n, max(0, right + rng.randint(-n // 10, n // 25)))}
        exact.append((n, {arm: Fraction(100 * k, n) for arm, k in counts.items()}))
        shown = {arm: audit_tables.rounded(value, decimals, rounding) for arm, value in exact[-1][1].items()}
        tasks.append({**TASK, "name": f"task {number}", "num_documents": n, **shown})
    weights = [Fraction(n if by_documents else 1) for n, _ in exact]
    means = {}
    for arm in ("candidate", "baseline"):
        mean = sum((w * own[arm] for w, (_, own) in zip(weights, exact, strict=True)), Fraction(0)) / sum(weights)
        means[arm] = audit_tables.rounded(mean, decimals, rounding)
    candidate, baseline = Fraction(means["candidate"]), Fraction(means["baseline"])
    value = 100 * candidate / baseline if of == "retention" else candidate - baseline
    aggregates = [{"name": "headline", "of": of, "percent": audit_tables.rounded(value, rng.choice((1, 2)), rounding)}]
    if stated:
        aggregates += [{"name": arm, "of": arm, "percent": mean} for arm, mean in means.items()]
    return {"task": tasks, "aggregate": aggregates}


@pytest.mark.parametrize("of", ["retention", "difference"])
@pytest.mark.parametrize("decimals", [1, 2])
@pytest.mark.parametrize("stated", [False, True])
def test_means_that_were_rounded_first_are_a_reading(of: str, decimals: int, stated: bool) -> None:
    """Up to 23 % of such tables were contradicted."""
    for seed, by_documents in itertools.product(range(60), (False, True)):
        assert contradicted(once_rounded(seed, decimals, by_documents, of, stated)) == [], seed


def test_the_reading_is_named_with_the_figures_that_give_it() -> None:
    columns = (("one", "20.0"), ("two", "20.0"), ("three", "20.1"))
    rows = [{**TASK, "name": name, "baseline": "100.0", "candidate": candidate} for name, candidate in columns]
    found = texts({"task": rows, "aggregate": [{"name": "h", "percent": "20.10"}]})
    words = "h: stated 20.10 % fits the ratio of the unweighted means once rounded, 20.1 % and 100.0 %, of 3 tasks: "
    assert found[0].startswith(f"FITS {words}")
    assert "20.1 % and 100.0 %, 20.100 % (fits: 20.00 to 20.1" in found[0]
    found = texts({"task": rows, "aggregate": [{"name": "h", "percent": "20.20"}]})
    assert found[0].startswith("CONTRADICTS h: stated 20.20 %")
    # Means that are stated are those that were divided.
    means = [{"name": arm, "of": arm, "percent": text} for arm, text in (("candidate", "20.0"), ("baseline", "100.0"))]
    found = texts({"task": rows, "aggregate": [{"name": "h", "percent": "20.10"}, *means]})
    assert found[0].startswith("CONTRADICTS h: stated 20.10 %")


def test_rates_may_be_rounded_alike_before_they_are_divided() -> None:
    rates = [{"name": "ours", "tokens_per_s": "207"}, {"name": "theirs", "tokens_per_s": "50.49"}]

    def found(factor: str) -> str:
        return texts({"rate": rates, "speedup": [{"name": "h", "factor": factor, "of": ["ours", "theirs"]}]})[0]

    assert found("4.10") == "FITS h: stated 4.10x fits 207 / 50.49 tokens/s 4.100x (fits: 4.09 to 4.11)"
    assert found("4.14") == "CONFIRMS h: stated 4.14x is 207 / 50 tokens/s, once rounded, 4.140x"
    assert found("4.17").startswith("CONTRADICTS h: stated 4.17x, recomputed 207 / 50.49 tokens/s")


@pytest.mark.parametrize(("num_tasks", "decimals", "off"), [(11, 2, "0.02"), (11, 1, "0.1"), (4, 0, "1.5")])
def test_a_wrong_figure_that_the_roundings_allow_is_not_called_right(num_tasks: int, decimals: int, off: str) -> None:
    """Up to 100 % of such figures were said to be "the ratio of the unweighted means"."""
    for seed in range(30):
        rng = random.Random(seed)
        rows = []
        for number in range(num_tasks):
            baseline = rng.uniform(30, 95)
            candidate = min(100.0, baseline - 1 + rng.gauss(0, 2))
            shown = {arm: f"{v:.{decimals}f}" for arm, v in (("baseline", baseline), ("candidate", candidate))}
            rows.append({**TASK, "name": f"task {number}", **shown})
        ratio = 100 * sum(Fraction(r["candidate"]) for r in rows) / sum(Fraction(r["baseline"]) for r in rows)
        wrong = f"{float(ratio + Fraction(off)):.{max(1, decimals)}f}"
        [found, *_] = texts({"task": rows, "aggregate": [{"name": "h", "percent": wrong}]})
        assert found.startswith(("FITS", "CONTRADICTS")) or "is the mean of per-task ratios" in found, found
        assert "is the ratio of" not in found
