"""Several baselines read: each as if it were alone, the strongest, claims and what they name, reports, frames."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from tests.report_fixture import AUTOREGRESSIVE, quality_run, speed_run
from tests.several_baselines import alone, with_baselines
from twotower_eval import api, store
from twotower_eval.analyse import report, stats
from twotower_eval.analyse.claims import judge
from twotower_eval.analyse.claims.text import verdict_lines
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.several import baselines_of, least_speedup, strongest
from twotower_eval.analyse.report.baselines import baselines as baselines_section
from twotower_eval.records import Cell, Claim, DecoderSpec, GateLimits, OperatingPoint, SpeedSample, to_json
from twotower_eval.strict import from_json

SLOWER = dataclasses.replace(AUTOREGRESSIVE, version=2)
LOOKUP = DecoderSpec(kind="block_diffusion", params={"block_size": 2})  # any decoder of ours but the plain one
OTHERS = {"lookup": (LOOKUP, 0.7), "slower": (SLOWER, 1.3)}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A scored and a timed run against three baselines."""
    one, several = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("several")
    quality = quality_run(one, num_docs=60, perplexity=False)
    timed = speed_run(one, num_rounds=8)
    return [
        with_baselines(quality, several, OTHERS, wrong=range(5)),
        with_baselines(timed, several, OTHERS),
    ]


@pytest.fixture(scope="module")
def runs(paths: list[Path]) -> Runs:
    return Runs([store.load(path) for path in paths])


def claim(baseline: str, **changes: object) -> Claim:
    params = {"block_size": 16, "steps_per_block": 16, "threshold": 0.8}
    point = OperatingPoint(
        name="p",
        decoder=DecoderSpec(kind="block_diffusion", params=params),
        batch_size=1,
        num_devices=1,
        workload="answer",
    )
    plain = Claim(
        name=baseline or "any", quantity="speedup_time", subject="pair", baseline=baseline, point=point, source="here",
        expected=1.2, margin=0.05, limits=GateLimits(),
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize("name", ["plain", "lookup", "slower"])
def test_each_is_read_as_if_it_were_alone(name: str, paths: list[Path], runs: Runs, tmp_path: Path) -> None:
    own = Runs([store.load(alone(path, tmp_path, name)) for path in paths])
    seen = runs.against(name)
    assert [point.baseline.id for point in seen.speed] == [point.baseline.id for point in own.speed]
    for one, other in zip(seen.speed, own.speed, strict=True):
        for figure in ("time", "throughput", "null", "baseline_rate", "candidate_rate", "length"):
            assert getattr(one, figure) == getattr(other, figure)
        assert [(gate.kind, gate.outcome) for gate in one.gates] == [(gate.kind, gate.outcome) for gate in other.gates]
    assert [point.headline for point in seen.quality] == [point.headline for point in own.quality]
    assert seen.contradictions == own.contradictions == {}


def test_without_a_choice_it_is_the_first_that_decodes_plainly(paths: list[Path], runs: Runs, tmp_path: Path) -> None:
    assert (runs.baseline, runs.baselines) == ("plain", ("plain", "lookup", "slower"))
    assert {point.baseline.baseline for point in (*runs.speed, *runs.quality)} == {"plain"}
    one = store.load(paths[1])
    cells = tuple(sorted(one.manifest.cells, key=lambda cell: cell.baseline != "lookup"))
    turned = dataclasses.replace(one, manifest=dataclasses.replace(one.manifest, cells=cells))
    assert baselines_of(turned) == ("lookup", "plain", "slower")
    assert Runs([turned]).baseline == "plain"


def test_the_strongest_is_the_one_with_the_most_tokens_per_second(runs: Runs) -> None:
    [point] = runs.speed
    each = runs.each_baseline(point.key, point)
    assert [one.name for one in each] == ["plain", "lookup", "slower"]
    best = strongest(each)
    assert best is not None
    assert best.name == "lookup"
    least = least_speedup(each).estimate
    assert least is not None
    speedups = [one.speed.time.estimate for one in each if one.speed]
    assert least.value == min(one.value for one in speedups if one)
    assert least.low == min(one.low for one in speedups if one)
    assert best.speed is not None
    assert best.speed.time.estimate is not None
    own = stats.speedup(best.speed.timed, level=1 - 0.05 / 3)
    assert least.high == own.high > best.speed.time.estimate.high
    assert strongest(each[:1]) is None


NAMED = {"context-tower": "plain", "": "plain", "lookup": "lookup", "block_diffusion": "lookup", "slower": "slower"}


@pytest.mark.parametrize(("named", "baseline"), NAMED.items())
def test_a_claim_is_judged_against_the_baseline_that_it_names(named: str, baseline: str, runs: Runs) -> None:
    [verdict] = judge([claim(named)], runs)
    assert verdict.against is not None
    assert (verdict.against.name, verdict.against.num_baselines) == (baseline, 3)
    point = runs.against(baseline).speed[0]
    assert verdict.estimate is not None
    assert verdict.estimate.value == pytest.approx(point.time.estimate.value if point.time.estimate else 0)
    text = verdict_lines([claim(named)], [verdict])[0]
    assert f"against {baseline}" in text
    assert ("the strongest baseline in its runs is lookup, over which the speedup is" in text) is (baseline != "lookup")


def test_quality_is_paired_with_the_baseline_that_a_claim_names(runs: Runs) -> None:
    kept = {}
    for named in ("plain", "lookup"):
        one = claim(named, quantity="retention", scope=("sorting", "arithmetic"), expected=0.5, margin=0.005)
        [verdict] = judge([one], runs)
        assert verdict.estimate is not None
        kept[named] = verdict.estimate.value
    assert kept["lookup"] > kept["plain"]  # it is wrong on five documents more


def test_a_name_is_no_digest_and_a_plug_in_has_to_be_named(tmp_path: Path) -> None:
    plug_in = DecoderSpec(kind="own.mod:Slow", params={})
    one = speed_run(tmp_path / "one", num_rounds=8)
    path = with_baselines(one, tmp_path / "several", {"deadbeef": (plug_in, 5.0)})
    runs = Runs([store.load(path)])
    found = judge([claim("deadbeef"), claim("own.mod:Slow"), claim("context-tower")], runs)
    assert [verdict.outcome == "NOT_MEASURED" for verdict in found] == [True, False, False]
    assert [verdict.against.name for verdict in found if verdict.against] == ["deadbeef", "plain"]
    single = Runs([store.load(alone(path, tmp_path / "single", "deadbeef"))])
    plain, named = judge([claim("context-tower"), claim("own.mod:Slow")], single)
    assert plain.outcome == "NOT_MEASURED"
    assert "only a claim with baseline = 'own.mod:Slow' is about a baseline that own.mod:Slow decodes" in plain.reason
    assert named.against is not None


def test_the_report_shows_each_and_the_strongest_first(paths: list[Path], tmp_path: Path) -> None:
    folder = report.write(paths, tmp_path, csv=True)
    text = (folder / "report.md").read_text(encoding="utf-8")
    head = text[: text.index("## Claimed")]
    assert "against plain, " in head
    assert "against lookup (the strongest), " in head
    assert "Over the strongest, whichever it is: " in head
    assert "## Against each baseline" in text
    assert "Everything against lookup" in text
    lines = (folder / "tables" / "speed.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0].startswith("baseline,")
    assert [line.partition(",")[0] for line in lines[1:]] == ["plain", "lookup", "slower"]


def test_each_has_its_own_absolute_figures(runs: Runs) -> None:
    """Beside each ratio: useful tokens and answers per second of that baseline."""
    found = baselines_section(runs)
    table = found.tables["baselines"]
    assert table["baseline_answers_per_s"].nunique() == len(table) == 3
    assert table["candidate_answers_per_s"].nunique() == 1
    assert "its answers/s [95 %]" in found.markdown


def test_one_baseline_has_no_such_section_and_no_column(tmp_path: Path) -> None:
    folder = report.write([speed_run(tmp_path, num_rounds=8)], tmp_path / "reports", csv=True)
    assert "each baseline" not in (folder / "report.md").read_text(encoding="utf-8")
    assert not (folder / "tables" / "speed.csv").read_text(encoding="utf-8").startswith("baseline,")


def test_comparisons_and_frames_say_whose_they_are(paths: list[Path], tmp_path: Path) -> None:
    found = api.compare(*paths)
    assert [point.baseline.baseline for point in found.points] == ["plain", "lookup", "slower"]
    assert found.to_frame()["baseline"].tolist() == ["plain", "lookup", "slower"]
    assert found.strongest is not None
    assert found.strongest.baseline.baseline == "lookup"
    assert found.speedup_over_strongest is not None
    assert "against lookup: retention" in repr(found)
    frame = api.load_run(paths[1]).speed
    assert set(frame["baseline"].dropna()) == {"plain", "lookup", "slower"}
    one = speed_run(tmp_path, num_rounds=8)
    assert "baseline" not in api.load_run(one).speed
    assert api.compare(one).strongest is api.compare(one).speedup_over_strongest is None


def another(tmp_path: Path) -> Path:
    """A run with one baseline on the same prompts, in a launch of its own."""
    later = "20261103T120000Z-speed-cccccc"
    return speed_run(
        tmp_path,
        num_rounds=8,
        run_id=later,
        edit=lambda row: dataclasses.replace(row, launch_id=later) if isinstance(row, SpeedSample) else row,
    )


def test_a_run_with_one_of_them_is_pooled_with_that_one(paths: list[Path], tmp_path: Path) -> None:
    runs = Runs([store.load(path) for path in (paths[1], another(tmp_path))])
    assert [len(point.run_ids) for point in runs.speed] == [2]
    assert [len(point.run_ids) for point in runs.against("lookup").speed] == [1]


def test_runs_with_one_baseline_each_are_not_pooled_over_different_ones(paths: list[Path], tmp_path: Path) -> None:
    runs = Runs([store.load(alone(paths[1], tmp_path / "one", "lookup")), store.load(another(tmp_path))])
    assert [point.baseline.decoder.kind for point in runs.speed] == ["block_diffusion", "autoregressive"]
    assert [point.num_rounds for point in runs.speed] == [8, 8]


def test_the_donor_of_log_likelihoods_decides_what_is_equal_by_construction(tmp_path: Path) -> None:
    path = with_baselines(quality_run(tmp_path / "one", num_docs=30, tasks=("choice",)), tmp_path, OTHERS)
    run = store.load(path)
    donors = {None: "a", "plain": "a", "lookup": "b", "slower": "a"}
    cells = tuple(dataclasses.replace(cell, likelihoods_of=donors[cell.baseline]) for cell in run.manifest.cells)
    runs = Runs([dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, cells=cells))])
    equal = {name: runs.against(name).quality[0].equal_tasks for name in runs.baselines}
    assert equal == {"plain": ("choice",), "lookup": (), "slower": ("choice",)}


def test_old_cells_are_read_and_written_as_before() -> None:
    checkpoint = {"name": "a", "family": "b", "source": "c", "digest": "d", "dtype": "float32", "devices": ["cpu"]}
    workload = {"kind": "task", "name": "n", "digest": "d"}
    cell = {"id": "x", "arm": "baseline", "decoder": {"kind": "x"}, "checkpoint": checkpoint, "workload": workload}
    assert not {"baseline", "likelihoods_of"} & to_json(from_json(Cell, cell)).keys()


def test_a_run_without_names_has_no_baselines(tmp_path: Path) -> None:
    assert baselines_of(store.load(speed_run(tmp_path, num_rounds=8))) == ()
