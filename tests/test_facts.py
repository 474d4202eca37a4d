"""Facts are fields: no code of the package looks into a text that was made for people."""

from __future__ import annotations

import dataclasses

import pytest

from twotower_eval.analyse import stats
from twotower_eval.analyse.calibration.simulate import Tally
from twotower_eval.analyse.calibration.tables import remark, rows
from twotower_eval.analyse.report.page import page
from twotower_eval.analyse.report.text import table
from twotower_eval.analyse.words.methods import method_text
from twotower_eval.records import Estimate, Method, MethodKind


def test_a_table_of_texts_is_told_by_its_mark_and_not_by_its_header() -> None:
    rows_of = [["1", "a", "b"]]
    marked = page("# t\n\n" + table(["document", "one", "other"], rows_of, verbatim=True), {})
    assert '<div class="table texts"' in marked
    assert "verbatim" not in marked
    headed = page("# t\n\n" + table(["document", "what the clock says", "n"], rows_of), {})
    assert '<div class="table"' in headed


def test_no_text_of_a_model_can_mark_a_table() -> None:
    made = page("# t\n\n&lt;!-- verbatim --&gt;\n\n| a |\n|---|\n| b |\n", {})
    assert '<div class="table"' in made


def _estimate(method: Method | str) -> Estimate:
    return Estimate(value=0.98, low=0.9, high=1.06, level=0.9, n=100, method=method)


def test_only_an_exact_bound_of_clusters_none_of_which_differs_shrinks_with_their_number() -> None:
    def needed(method: Method | str) -> int | None:
        found = stats.still_needed(_estimate(method), relation="at_least", expected=1.0, margin=0.05)
        return found.total

    by_root = needed(Method(kind="paired_bootstrap", num_resamples=10))
    assert needed(Method(kind="exact_bound", num_differing=0)) < by_root
    assert needed(Method(kind="exact_bound", num_differing=3)) == by_root
    # A text is nothing to go by, whatever it says.
    assert needed("exact binomial bound, 0 of 100 clusters discordant") == by_root


def test_an_estimate_of_others_keeps_the_name_of_its_method() -> None:
    found = _estimate("my own")
    assert method_text(found) == "my own"
    assert found.method_kind is None
    assert not stats.is_exact(dataclasses.replace(found, method="an exact one"))


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Method(kind="exact_bound", num_differing=2), "exact binomial bound, 2 of 100 clusters discordant"),
        (
            Method(kind="clustered_bootstrap", num_resamples=10_000, num_tasks=3),
            "mean over 3 tasks, clustered bootstrap, 10,000 resamples, or linearised t interval where wider",
        ),
        (
            Method(kind="function_bootstrap", function="f1", num_resamples=50, num_tasks=2),
            "mean over 2 tasks, each by a clustered bootstrap through f1, 50 resamples",
        ),
        (
            Method(kind="crossed_bootstrap", num_resamples=9, drawn="rounds", num_drawn=4, num_calls=3, devices=(1, 2)),
            "crossed paired bootstrap of 4 rounds x 3 calls, 9 resamples, t interval on the log, corrected for skewness"
            ", times 1 / 2 devices",
        ),
        (
            Method(kind="paired_bootstrap", num_resamples=8, num_scoring=1),
            "paired clustered bootstrap, 8 resamples, or linearised t interval where wider, exact bound where the "
            "candidate scores in 1 of 100 clusters",
        ),
    ],
)
def test_methods_in_words(method: Method, words: str) -> None:
    assert method_text(_estimate(method)) == words


def test_every_kind_of_method_has_words() -> None:
    for kind in MethodKind.__args__:
        assert method_text(_estimate(Method(kind=kind, num_resamples=7, num_differing=1)))


def test_a_world_that_is_called_a_miss_has_missed_nothing() -> None:
    tally = Tally(
        name="MISSED", size="9", num=600, num_found=600, num_covered=570, num_supported=20, num_refuted=20, num_exact=0
    )
    [row] = rows([tally])
    assert (row.missed, remark(row)) == (None, "")
