"""A decoder with two parameters of its own, from the command line to the verdict: run, time, report, judge."""

import contextlib
import csv
import dataclasses
import io
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import report_fixture as made

from twotower_eval import cli, store
from twotower_eval.analyse.claims import load_claims
from twotower_eval.analyse.compare.points import long_name, short_name
from twotower_eval.analyse.compare.tradeoff import families
from twotower_eval.analyse.report.plots import legend_columns
from twotower_eval.decoder_settings import cross_decoders
from twotower_eval.measure.sizing import items
from twotower_eval.plan import RunPlan
from twotower_eval.records import OWN_DECODERS, DecoderSpec, Workload

KIND = "tests.two_parameters:Impatient"
TASK = "miniature_sort"
WORKLOAD = Workload(kind="task", name=TASK, digest="d")
POINTS = [(2, "first"), (2, "second"), (0, "first"), (0, "second")]
SET = ["--decoder", KIND, "--set", "patience=2,0", "--set", "choice=first,second"]
CLAIMS = f"""
title = "Two parameters"

[[point]]
name = "patient"
decoder = {{ kind = "{KIND}", patience = 0, choice = "first" }}

[[point]]
name = "elsewhere"
decoder = {{ kind = "{KIND}", set = {{ patience = 9, choice = "second" }} }}
batch_size = 1
num_devices = 1
workload = "answer"

[[point]]
name = "half said"
decoder = {{ kind = "{KIND}", patience = 2 }}
"""
CLAIM = """
[[claim]]
name = "{name}"
quantity = "{quantity}"
expected = 0.5
subject = "miniature"
baseline = "context-tower"
{scope}
point = "{point}"
source = "this test"
"""
SCOPE = f'scope = ["{TASK}"]'


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run and a timing of four operating points, and claims on three."""
    root = tmp_path_factory.mktemp("measured")
    common = [*SET, "--tasks", TASK, "--out", str(root)]
    assert cli.main(["run", *common, "--limit", "2", "--trace", "0"]) == 0
    timing = ["--num-prompts", "1", "--min-rounds", "2", "--warmup-rounds", "0", "--probes", "0", "--no-costs"]
    assert cli.main(["speed", *common, *timing, "--threads", "1"]) == 0
    claims = [
        CLAIM.format(name="kept", quantity="retention", scope=SCOPE, point="patient"),
        CLAIM.format(name="nowhere", quantity="speedup_time", scope="", point="elsewhere"),
        CLAIM.format(name="open", quantity="retention", scope=SCOPE, point="half said"),
    ]
    (root / "claims.toml").write_text(CLAIMS + "".join(claims))
    return root


def folders(root: Path) -> list[str]:
    return [str(path) for path in sorted(root.iterdir()) if path.is_dir()]


def test_every_point_is_run_and_timed_as_it_was_said(measured: Path) -> None:
    for path in folders(measured):
        run = store.load(Path(path))
        candidates = [cell for cell in run.manifest.cells if cell.arm == "candidate"]
        assert [tuple(cell.decoder.params.values()) for cell in candidates] == POINTS
        assert run.manifest.plan["set"] == {"patience": [2, 0], "choice": ["first", "second"]}
        answers = {(row.cell, row.doc_id): row.generation.token_ids for row in run.generations}
        written = {cell.id: [ids for (own, _), ids in answers.items() if own == cell.id] for cell in candidates}
        assert all(len(ids) <= 2 for ids in [*written[candidates[0].id], *written[candidates[1].id]])
        assert written[candidates[2].id] != written[candidates[3].id], "the word reaches the decoder"


def test_a_run_is_resumed_and_another_setting_is_refused(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = next(path for path in folders(measured) if "-run-" in path)
    assert cli.main(["run", "--resume", run]) == 0
    assert cli.main(["run", "--resume", run, "--set", "patience=1,0"]) == 2
    assert "set was patience=2,0" in capsys.readouterr().err


def test_claims_are_judged_at_the_whole_point(measured: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A claim that was measured; one that was not, with the command that does; one that names half of its decoder."""
    path = measured / "claims.toml"
    code = cli.main(["claims", "check", str(path), *folders(measured)])
    kept, nowhere, half = [line for line in capsys.readouterr().out.splitlines() if "claimed:" in line]
    assert code in (4, 6)
    assert kept.split()[:2] != ["NOT", "MEASURED"]
    command = f"`twotower-eval speed --decoder {KIND} --launches 5 --set patience=9 --set choice=second`"
    assert nowhere.startswith("NOT MEASURED")
    assert f"{command} measures it" in nowhere
    assert 'patience 0, choice "first"' in nowhere
    assert half.startswith("NOT MEASURED")
    assert "does not name choice, but this decoder was measured with choice=first" in half


def test_the_command_of_a_claim_measures_its_point(measured: Path) -> None:
    from twotower_eval.analyse.claims.looks import measuring_command
    from twotower_eval.decoder_settings import parse_set, typed_settings

    [claim] = [one for one in load_claims(measured / "claims.toml").claims if one.name == "nowhere"]
    words = measuring_command(claim)
    given = [value for option, value in pairwise(words) if option == "--set"]
    plan = RunPlan(decoder=KIND, set=typed_settings(KIND, parse_set(given)))
    [spec] = cross_decoders(plan)
    assert (spec.kind, dict(spec.params)) == (claim.point.decoder.kind, dict(claim.point.decoder.params))


def test_a_report_names_every_point_whole_and_draws_what_varies(measured: Path, tmp_path: Path) -> None:
    options = ["--claims", str(measured / "claims.toml"), "--format", "csv", "--out", str(tmp_path)]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert cli.main(["report", *folders(measured), *options]) == 0
    report = Path(out.getvalue().strip())
    text = report.read_text(encoding="utf-8")
    for patience, choice in POINTS:
        assert f'| {KIND}, patience {patience}, choice "{choice}" |' in text
    assert "| operating point | S_time" in text
    assert "block, steps, threshold" not in text
    assert "## Collapse: over patience\n" in text
    assert (report.parent / "over_patience.png").is_file()
    assert f"--decoder {KIND} --set patience=2,0 --set choice=first,second" in text
    rows = list(csv.DictReader((report.parent / "tables" / "speed.csv").read_text(encoding="utf-8").splitlines()))
    assert {(int(row["param_patience"]), row["param_choice"]) for row in rows} == set(POINTS)


# --- names ---------------------------------------------------------------------------------------------------------


def test_names_of_ours_stay_as_they_were() -> None:
    block = made.block_diffusion(threshold=0.9)
    assert (long_name(block), short_name(block)) == ("block 16, 16 steps, threshold 0.9", "16/16/0.9")
    hot = dataclasses.replace(block, params={**block.params, "temperature": 0.7, "batch_mean_t": False})
    assert short_name(hot) == "16/16/0.9, temperature 0.7"
    greedy = DecoderSpec(kind="autoregressive", params={"temperature": 0.0})
    assert (long_name(greedy), short_name(greedy)) == ("autoregressive", "autoregressive")


def test_our_decoders_are_known_to_both_arms() -> None:
    from twotower_eval.engine.decoders import DECODERS

    assert set(OWN_DECODERS) == set(DECODERS)
    assert DecoderSpec(kind="registered").is_plug_in, "an installed package's decoder has a short name, too"


def test_a_registered_decoder_may_write_its_texts_as_it_likes() -> None:
    """Its name has no colon, and on --resume it was taken for one of ours, whose texts are those of their tokens."""
    from twotower_eval.measure.harness import jobs

    cell = made.make_cell("candidate", DecoderSpec(kind="registered"), WORKLOAD)
    answer = SimpleNamespace(finish="eos", text="as it likes", token_ids=(1,))
    run = SimpleNamespace(generations=[SimpleNamespace(generation=answer, cell=cell.id)])
    job = SimpleNamespace(cell=cell, task=SimpleNamespace(generates=True), model=None)
    jobs._check_texts_are_of_tokens(run, [job])  # type: ignore[arg-type, list-item]


def test_two_points_of_a_plug_in_never_share_a_name() -> None:
    """Only parameters that are on were named: patience 0 and no patience at all were one, and in a legend all were."""
    values: list[Any] = [None, 0, 1, False, True, "", "1", 0.5]
    specs = [DecoderSpec(kind="a.b:C", params={"width": value, "threshold": 0.5}) for value in values]
    for name in (long_name, short_name):
        assert len({name(spec) for spec in specs}) == len(values)
        assert all("threshold 0.5" in name(spec) for spec in specs)


def test_families_are_called_by_what_they_share() -> None:
    """A decoder without blocks was called "block None, None steps"."""
    cells = [
        made.make_cell("candidate", DecoderSpec(kind="a.b:C", params={"width": width, "kind": "x"}), WORKLOAD)
        for width in (1, 2)
    ]
    assert list(families("width", cells).values()) == ['a.b:C, kind "x"']
    assert families("kind", cells) == {}, "a word has no place on an axis"


def test_profiles_of_two_settings_of_a_plug_in_are_two() -> None:
    """Only steps, threshold and temperature were named, and of two settings of anything else one was lost."""
    named = {items._label(DecoderSpec(kind="a.b:C", params={"block_size": 4, "width": width})) for width in (0, 1)}
    assert named == {"a.b:C, width 0", "a.b:C, width 1"}
    plain = made.block_diffusion(threshold=0.9)
    assert items._label(plain) == "block diffusion, steps 16, threshold 0.9"


def test_a_legend_has_fewer_columns_where_names_are_long() -> None:
    assert legend_columns(["1  16/16/0.8"], 5, panels=2) == 5
    assert legend_columns(["x" * 60], 5, panels=2) == 2
    assert legend_columns(["x" * 200], 3, panels=1) == 1
