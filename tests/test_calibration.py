"""The simulation itself: its truths, its counting, its tables; and that it catches a broken method."""

import csv
import dataclasses
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from twotower_eval.analyse import calibration, stats
from twotower_eval.analyse.calibration import simulate, tables
from twotower_eval.analyse.calibration.look_worlds import LookTally, calibrate_looks, look_worlds
from twotower_eval.analyse.calibration.quality_worlds import (
    QualityWorld,
    fresh_quality_worlds,
    other_quality_worlds,
    quality_worlds,
)
from twotower_eval.analyse.calibration.speed_worlds import (
    SpeedWorld,
    fresh_serial_worlds,
    fresh_speed_worlds,
    noise,
    null_worlds,
    sampled,
    serial_worlds,
    speed_worlds,
)
from twotower_eval.analyse.calibration.tables import remark
from twotower_eval.records import Estimate


def tally(**changes) -> simulate.Tally:
    fields = {"num": 1_000, "num_found": 1_000, "num_covered": 950, "num_supported": 50, "num_refuted": 50}
    return simulate.Tally(name="retention: w", size="9 clusters", **{**fields, "num_exact": 0, **changes})


@pytest.mark.parametrize(
    "world",
    [*quality_worlds()[::4], *fresh_quality_worlds()[2:10:3], *other_quality_worlds()],
    ids=lambda world: f"{world.quantity}: {world.name}",
)
def test_what_a_world_states_is_what_its_scores_come_to(world: QualityWorld) -> None:
    rng = np.random.default_rng(3)
    tables_R = [world.draw(rng) for _ in range(400)]
    baseline_RK, candidate_RK = (
        np.array([table.task_means_K(getattr(table, name)) for table in tables_R])
        for name in ("baseline_CL", "candidate_CL")
    )
    if world.quantity in ("score", "score difference"):
        values_R = candidate_RK.mean(axis=1) - (world.quantity == "score difference") * baseline_RK.mean(axis=1)
        found, error = values_R.mean(), values_R.std() / 20
    else:
        each = world.quantity == "mean of ratios"
        a_RK, b_RK = (x_RK if each else x_RK.mean(axis=1, keepdims=True) for x_RK in (baseline_RK, candidate_RK))
        ratio_K = b_RK.mean(axis=0) / a_RK.mean(axis=0)
        found = ratio_K.mean()
        error = ((b_RK - ratio_K * a_RK) / a_RK.mean(axis=0)).mean(axis=1).std() / 20
    assert abs(found - world.truth) <= 4 * error + 1e-12


def test_every_quantity_of_a_claim_about_quality_is_calibrated() -> None:
    """Scores, their differences and the mean of ratios were claimed and never calibrated."""
    worlds = [*quality_worlds(), *fresh_quality_worlds()]
    assert {world.quantity for world in worlds} == {"retention", "mean of ratios", "score difference", "score"}


@pytest.mark.parametrize(
    "world",
    [*(speed_worlds()[k] for k in (1, 10, 13, 20, 26)), *fresh_speed_worlds()[2:6:3]],
    ids=lambda world: world.name,
)
def test_the_stated_speedup_is_the_ratio_of_expected_sums(world: SpeedWorld) -> None:
    rng, sums = np.random.default_rng(4), np.zeros(4)
    for _ in range(1_500):
        calls = world.draw(rng)
        sums += [
            calls.baseline_s.sum(),
            calls.candidate_s.sum(),
            calls.baseline_tokens.sum(),
            calls.candidate_tokens.sum(),
        ]
    time, length = sums[0] / sums[1], sums[3] / sums[2]
    assert {"time": time, "length": length, "throughput": time * length}[world.quantity] == pytest.approx(
        world.truth, rel=0.01
    )


@pytest.mark.parametrize(
    "world",
    [
        *(world for world in serial_worlds() if world.num_rounds in (6, 12, 40)),
        *(world for world in fresh_serial_worlds() if world.num_rounds in (9, 24, 12)),
    ],
    ids=lambda world: f"{world.name}, {world.size}",
)
def test_dependence_changes_no_true_speedup(world: SpeedWorld) -> None:
    """Wander, spells and launches hit either arm alike in the long run."""
    rng = np.random.default_rng(6)
    sums = np.array([(calls.baseline_s.sum(), calls.candidate_s.sum()) for calls in map(world.draw, [rng] * 600)])
    baseline_s, candidate_s = sums.mean(axis=0)
    error = (sums[:, 0] / baseline_s - sums[:, 1] / candidate_s).std() / math.sqrt(600)
    assert math.log(baseline_s / candidate_s / world.truth) == pytest.approx(0, abs=4 * error)


def test_rounds_in_a_world_of_dependence_are_alike_as_it_says() -> None:
    """Neighbours correlate by 0.8 where arms wander by AR(1) 0.8, as far as noise of single calls lets them."""
    world = next(one for one in serial_worlds() if one.num_rounds == 40 and "of 5 %" in one.name)
    found = [stats.speedup(world.draw(np.random.default_rng(seed)), num_resamples=100).serial for seed in range(60)]
    lags = [one.lag1 for one in found if one is not None and one.lag1 is not None]
    assert len(lags) == 60
    assert 0.5 < np.mean(lags) < 0.75


def test_noise_has_mean_one() -> None:
    rng = np.random.default_rng(5)
    for kind, size in (("lognormal", 0.2), ("heavy tail", 0.1), ("stalls", 0.03)):
        assert noise(rng, kind, size, (400_000,)).mean() == pytest.approx(1, abs=0.003)


def judge(world: SpeedWorld, num: int = 150) -> tables.Row:
    found = simulate.calibrate_speed(world, num=num, num_resamples=300, seed=1, advance=lambda *_: None)
    return tables.rows([found])[0]


def test_a_nested_bootstrap_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls resampled within rounds, as if each round had prompts of its own, cover far less than they say."""
    world = sampled("time", 12, 16, "lognormal", 0.05, 0.2)
    assert not judge(world).missed

    def nested(calls, quantity="time", *, level=0.95, num_resamples=300, seed=0):
        rng = np.random.default_rng(seed)
        shape = calls.baseline_s.shape
        index_QRP = rng.integers(0, shape[1], (num_resamples, *shape))
        sums = [np.take_along_axis(x[None], index_QRP, 2).sum((1, 2)) for x in (calls.baseline_s, calls.candidate_s)]
        low, high = np.quantile(sums[0] / sums[1], [(1 - level) / 2, (1 + level) / 2])
        value = calls.baseline_s.sum() / calls.candidate_s.sum()
        return Estimate(value=value, low=low, high=high, level=level, n=1, method="nested")

    monkeypatch.setattr(stats, "speedup", nested)
    broken = judge(world)
    assert remark(broken) == "MISSED: coverage"
    assert (broken.coverage.value or 1) < 0.75


def test_skew_sums_of_few_prompts_support_no_more_than_they_may() -> None:
    """A symmetric interval supported what is false by a hair in 7 % where few prompts differ in length and gain."""
    row = judge(sampled("time", 20, 8, "lognormal", 0.05, 0.3), num=2_000)
    assert 0.02 < (row.supported.value or 1) < 0.055  # one standard deviation is 0.005
    assert 0.95 < (row.coverage.value or 0) < 0.98


def lost_whole(*, clustered: bool) -> QualityWorld:
    """Sixty problems of twenty samples; the candidate loses most samples of about nine of them, and no other."""
    names = ["t"] * 1_200
    clusters = [str(i // 20 if clustered else i) for i in range(1_200)]

    def draw(rng: np.random.Generator) -> stats.ScoreTable:
        kept = (rng.random((60, 1)) < 0.85) | (rng.random((60, 20)) < 0.2)
        baseline = (rng.random((60, 20)) < 0.8).astype(float)
        scores = stats.PairedScores(
            tasks=names,
            groups=names,
            clusters=clusters,
            baseline=baseline.ravel(),
            candidate=(baseline * kept).ravel(),
        )
        return scores.table

    means = {"baseline": 0.8, "candidate": 0.8 * (0.85 + 0.15 * 0.2)}
    return dataclasses.replace(quality_worlds()[0], name="lost whole", **means, clusters=clusters, draw=draw)


def test_ignored_clusters_are_caught() -> None:
    """Twenty samples of a problem taken for twenty problems.

    The test asked only that this cover no more often; in the world it used, where every problem keeps the same share,
    it covered as often.
    """
    run = {"num": 200, "num_resamples": 300, "seed": 0, "advance": lambda *_: None}
    good, bad = (
        tables.rows([simulate.calibrate_quality(lost_whole(clustered=clustered), **run)])[0]
        for clustered in (True, False)
    )
    assert not good.missed
    assert remark(bad) == "MISSED: coverage"
    assert (bad.coverage.value or 1) < 0.6


def test_misses_are_beyond_chance_and_causes_are_named_where_they_are_known() -> None:
    good, low, wrong, exact, above, some = tables.rows(
        [
            tally(),
            tally(num_covered=890),
            tally(num_refuted=90),
            tally(num_covered=1_000, num_exact=600),
            tally(num_covered=1_000, num_exact=99),
            tally(num_found=900, num_covered=850),
        ]
    )
    assert (remark(good), good.missed) == ("", None)
    assert (remark(low), low.missed) == ("MISSED: coverage", "coverage")
    assert remark(wrong) == "MISSED: wrong verdicts"
    assert remark(exact) == "exact bound in 60 %"
    assert remark(above) == "covers above 97 %"
    assert remark(some) == "no interval in 10.0 %, so no verdict"
    assert not tables.rows([tally(num_refuted=56)])[0].missed


def markdown(chosen: Sequence[tables.Row], fresh: Sequence[tables.Row] = (), nulls: Any = ()) -> str:
    return tables.as_markdown((chosen, fresh), nulls, num_resamples=300, seed=7, version="1")


def test_the_report_says_what_was_found() -> None:
    nulls = [simulate.NullTally(name="noise", size="5 rounds x 16 calls", num=1_000, num_off=4, num_wide=30)]
    found = tables.rows([tally(), tally(num_covered=890, num_refuted=66)])
    text = markdown(found[:1], found[1:], nulls)
    assert "**1 of 2 worlds miss what is required.** As they came out: coverage 89.0 to 95.0 %" in text
    assert "wrong SUPPORTED 5.0 [3.7, 6.5] % (retention: w, 9 clusters) and wrong REFUTED 6.6 [5.1, 8.3] %" in text
    assert "Of the 4 rates of wrong verdicts 1 lie above 5 % by more than their own Monte-Carlo interval" in text
    chosen, fresh = text.split("## Fresh worlds, on which nothing was tuned")
    assert "| retention: w | 9 clusters | 95.0 [93.5, 96.3] | 5.0 [3.7, 6.5] |" in chosen
    assert "| retention: w | 9 clusters | 89.0 [86.9, 90.9] | 5.0 [3.7, 6.5] |" in fresh
    assert "| noise | 5 rounds x 16 calls | 0.4 [0.1, 1.0] | 3.0 [2.0, 4.3] |" in text
    few = markdown(tables.rows([tally(num=20, num_found=20, num_covered=19, num_supported=1, num_refuted=1)]))
    assert "too few to tell" in few
    assert "Fresh worlds" not in few
    good = markdown(tables.rows([tally(num_covered=980)]))
    assert "Up to 6.5 % seen in one world could still be chance." in good
    assert "above 97 % in 1 of 1 worlds, in 0 of which the exact bound" in good
    table = list(csv.DictReader(io.StringIO(tables.as_csv(found, nulls))))
    assert [row["covered"] for row in table] == ["950", "890", ""]
    assert table[2]["null_off"] == "4"


def test_the_same_seed_gives_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    worlds, speed, null = quality_worlds()[1:3], speed_worlds()[:1], null_worlds()[:1]
    monkeypatch.setattr(calibration, "quality_worlds", lambda: worlds)
    monkeypatch.setattr(calibration, "speed_worlds", lambda: speed)
    monkeypatch.setattr(calibration, "null_worlds", lambda: null)
    monkeypatch.setattr(calibration, "fresh_quality_worlds", lambda: fresh_quality_worlds()[:1])
    monkeypatch.setattr(calibration, "fresh_speed_worlds", lambda: ())
    monkeypatch.setattr(calibration, "look_worlds", lambda: look_worlds()[:1])
    monkeypatch.setattr(calibration, "serial_worlds", lambda: serial_worlds()[:1])
    monkeypatch.setattr(calibration, "fresh_serial_worlds", lambda: ())
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = calibration.calibrate(tmp_path / name, num_repetitions=8, num_resamples=200, seed=seed)
        texts.append((tmp_path / name / "calibration.csv").read_text())
        assert path.read_text().startswith("# Calibration")
    assert texts[0] == texts[1] != texts[2]
    with pytest.raises(ValueError, match="repetitions must be 1 or more, not"):
        calibration.calibrate(tmp_path, num_repetitions=0)


@pytest.mark.parametrize("world", [look_worlds()[0], look_worlds()[3]], ids=lambda world: world.name)
def test_looking_until_it_is_supported_has_its_price(world: Any) -> None:
    """Five looks at 95 % each support a false claim more often than one. The first look has to be able to err."""
    found = calibrate_looks(world, num=150, num_resamples=200, seed=0, advance=lambda num=1, /: None)
    assert found.num_first > 0
    assert found.num_free > max(2, 2 * found.num_first)
    assert tables.Rate(events=found.num_priced, n=found.num).bounds()[0] < 0.06
    assert found.num_first <= found.num_priced < found.num_free


def test_the_report_shows_looks_free_and_at_their_price() -> None:
    looks = [LookTally(name="again", size="5 rounds", num=1000, num_first=50, num_free=140, num_priced=55)]
    text = tables.as_markdown(([], []), [], looks, num_resamples=1000, seed=0, version="1")
    assert "| again | 5 rounds | 5.0 [3.7, 6.5] | 14.0 [11.9, 16.3] | 5.5 [4.2, 7.1] |" in text
    rows = list(csv.DictReader(io.StringIO(tables.as_csv([], [], looks))))
    assert [(row["kind"], row["supported"]) for row in rows] == [("looks free", "140"), ("looks at a price", "55")]
