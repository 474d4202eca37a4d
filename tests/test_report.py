"""Reports from synthetic runs: the numbers, what is refused, what is said when something is missing, the bytes."""

import dataclasses
import json
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import report_fixture as made

from twotower_eval import store
from twotower_eval.analyse import report, stats
from twotower_eval.analyse.compare.figures import Measured
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.tradeoff import families
from twotower_eval.analyse.report import text
from twotower_eval.analyse.report.sweeps import measures
from twotower_eval.analyse.report.text import Section
from twotower_eval.records import DecoderSpec, Estimate, FileDigest, GenerationRow, Score, SpeedSample, sha256_text


def write(out: Path, *paths: Path, **options) -> str:
    return (report.write(paths, out, **options) / "report.md").read_text(encoding="utf-8")


def row_of(markdown: str, *starts: str) -> list[str]:
    """Cells of the first table row whose leading cells start so."""
    for line in markdown.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split(" | ")]
        if line.startswith("|") and len(cells) >= len(starts) and all(map(str.startswith, cells, starts)):
            return cells
    raise AssertionError(f"no table row {starts} in:\n{markdown}")


def named(markdown: str, start: str, column: str) -> dict[str, str]:
    """Cells by their column's name: of the first row that starts so in a table that has this column."""
    header: list[str] = []
    lines = markdown.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        cells = [cell.strip() for cell in line.removeprefix("|").removesuffix("|").split(" | ")]
        if following.startswith(("| :-", "| --")):
            header = cells
        elif line.startswith("|") and column in header and cells[0].startswith(start):
            return dict(zip(header, cells, strict=True))
    raise AssertionError(f"no row {start!r} in a table with {column!r} in:\n{markdown}")


def kept(markdown: str, task: str) -> dict[str, str]:
    return named(markdown, task, KEPT)


def faster(markdown: str, point: str = "block 16") -> dict[str, str]:
    return named(markdown, point, "rounds x calls")


KEPT, TIME = "retention [95 %]", "S_time [95 %]"


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A run, a speed run, and the folder of their report."""
    root = tmp_path_factory.mktemp("usual")
    paths = made.quality_run(root), made.speed_run(root)
    return (*paths, report.write(paths, root / "reports"))


@pytest.fixture(scope="module")
def swept(tmp_path_factory) -> Path:
    """The report of a sweep over three block sizes, two ways to set steps, three thresholds."""
    root = tmp_path_factory.mktemp("swept")
    runs = made.quality_run(root, decoders=made.sweep(), num_docs=60)
    speeds = made.speed_run(root, decoders=made.sweep(), batch_sizes=(1, 4), num_rounds=3, num_calls=4)
    return report.write([runs, speeds], root / "reports")


def markdown_of(folder: Path) -> str:
    return (folder / "report.md").read_text(encoding="utf-8")


# --- the numbers ---------------------------------------------------------------------------------------------------


def scores_of(path: Path, arm: str, task: str) -> np.ndarray:
    run = store.load(path)
    rows = [s for s in run.scores if run.cells[s.cell].arm == arm and s.task == task and s.headline]
    return np.array([s.value for s in sorted(rows, key=lambda s: s.doc_id)])


def test_retention_table_holds_what_the_rows_say(usual) -> None:
    path, _, folder = usual
    markdown = markdown_of(folder)
    means = {(arm, task): scores_of(path, arm, task).mean() for arm in ("baseline", "candidate") for task in made.TASKS}
    row = kept(markdown, "arithmetic")
    assert (row["scored by"], row["metric (filter)"], row["n (clusters)"]) == ("generation", "exact_match", "150 (150)")
    assert row["baseline"] == f"{100 * means['baseline', 'arithmetic']:.1f} %"
    assert row[KEPT].startswith(f"{100 * means['candidate', 'arithmetic'] / means['baseline', 'arithmetic']:.1f} % [")
    lost = (scores_of(path, "baseline", "arithmetic") > scores_of(path, "candidate", "arithmetic")).sum()
    assert row["lost / gained (p)"].startswith(f"{lost} / ")

    def averaged(arm: str, tasks: list[str]) -> float:
        words = (means[arm, "words_de"] + means[arm, "words_en"]) / 2
        return float(np.mean([words if task == "words" else means[arm, task] for task in tasks]))

    for name, tasks in (
        ("**headline**", ["arithmetic", "sorting", "words", "choice"]),
        ("**decoder-exercised**", ["arithmetic", "sorting", "words"]),
    ):
        total = kept(markdown, name)
        assert f"({len(tasks)} tasks)" in total["task"]
        assert total["baseline"] == f"**{100 * averaged('baseline', tasks):.1f} %**"
        assert total[KEPT].startswith(f"**{100 * averaged('candidate', tasks) / averaged('baseline', tasks):.1f} % [")


def test_grouped_task_counts_once_and_shows_its_members(usual) -> None:
    markdown = markdown_of(usual[2])
    group = kept(markdown, "words (mean of 2)")
    assert group["n (clusters)"] == "300 (150)"  # the same item in both languages is one cluster
    members = [kept(markdown, f"{text.NONE} words_{language}") for language in ("de", "en")]
    mean = np.mean([float(member["baseline"].removesuffix(" %")) for member in members])
    assert float(group["baseline"].removesuffix(" %")) == pytest.approx(mean, abs=0.1)


def test_what_cannot_differ_is_named_and_kept_apart(usual) -> None:
    markdown = markdown_of(usual[2])
    assert kept(markdown, "choice")[KEPT] == "100 % by construction"
    assert "Equal by construction: choice" in markdown
    assert "on the tasks that its decoder answers)" in markdown


def test_likelihoods_computed_for_both_arms_are_not_called_equal_by_construction(tmp_path) -> None:
    path = made.quality_run(tmp_path, tasks=["arithmetic", "choice"], edit=lambda r: None if is_likelihood(r) else r)
    row = kept(write(tmp_path, path), "choice")
    assert row[KEPT].startswith("100.0 % [")


def is_likelihood(row) -> bool:
    return hasattr(row, "likelihood")


def test_perplexity_stands_apart_from_retention(usual) -> None:
    markdown = markdown_of(usual[2])
    row = row_of(markdown, "prose", "context-tower likelihood")
    assert row[2:5] == ["bits_per_byte", "lower", "40"]
    assert row[7].startswith("+0.0020 [")
    assert "4 tasks, 750 documents" in markdown
    assert row_of(markdown, "choice", "context-tower likelihood", "acc_norm")[3] == "higher"


def seconds_of(path: Path, arm: str, replica: int = 0) -> float:
    run = store.load(path)
    return sum(
        s.wall_s for s in run.speed if run.cells[s.cell].arm == arm and s.replica == replica and s.phase == "measure"
    )


def times(cell: str) -> float:
    """The figure of a cell such as ``1.25x [1.21, 1.29]``, whose decimals follow its interval."""
    return float(cell.partition("x [")[0])


def test_speed_table_holds_what_the_rows_say(usual) -> None:
    _, path, folder = usual
    markdown = markdown_of(folder)
    row = faster(markdown)
    assert row["workload"] == "answer: four tasks"
    baseline_s, candidate_s = seconds_of(path, "baseline"), seconds_of(path, "candidate")
    assert row["rounds x calls"] == "12 x 8"
    assert row["effective rounds (lag-1)"] == "12.0 (-0.15)"
    assert times(row[TIME]) == pytest.approx(baseline_s / candidate_s, abs=0.006)
    assert row["length ratio [95 %]"] == "1.000 [1.000, 1.000]"
    replica_s = seconds_of(path, "baseline", replica=1)
    assert times(row["A/A null [99 %]"]) == pytest.approx(baseline_s / replica_s, abs=0.006)
    samples = [s for s in store.load(path).speed if s.phase == "measure" and s.replica == 0]
    cells = store.load(path).cells
    prompts = [p for s in samples if cells[s.cell].arm == "candidate" for p in s.prompts]
    useful, denoiser = sum(p.num_tokens for p in prompts), sum(p.num_denoiser_forwards for p in prompts)
    forwards = denoiser + sum(p.num_context_forwards for p in prompts)
    cost = row_of(markdown, "block 16", "answer", "1", "96")
    assert cost[4].startswith(f"{useful / candidate_s:.3g} [")
    assert cost[5:10] == [
        f"{useful / denoiser:.2f}",
        f"{useful / (forwards - 96):.2f}",
        f"{useful / forwards:.2f}",
        f"{denoiser:,}",
        f"{forwards - denoiser:,}",
    ]
    assert cost[10] == f"{useful:,}"
    assert cost[11] == "192"
    assert cost[13] == "96 / 0 / 0"
    assert row_of(markdown, "baseline", "answer", "1", "96")[5:7] == [text.NONE, text.NONE]
    assert "1 launch: variation between launches was not measured." in markdown


def test_latency_is_tabled_apart(usual) -> None:
    _, path, folder = usual
    run = store.load(path)
    finish_s = [
        p.finish_s
        for s in run.speed
        for p in s.prompts
        if run.cells[s.cell].arm == "candidate" and s.phase == "measure"
    ]
    section = markdown_of(folder).partition("## Latency")[2]
    row = row_of(section, "block 16", "answer")
    assert row[3:] == ["96", text.seconds(float(np.quantile(finish_s, 0.5))), text.seconds(np.quantile(finish_s, 0.95))]


def test_what_calls_say_of_their_inside_is_shown(usual, tmp_path) -> None:
    """It was journalled with every call, at the price of two waits for the devices, and nobody showed it."""

    def telling(row):
        if not isinstance(row, SpeedSample):
            return row
        is_candidate = row.prompts[0].num_denoiser_forwards > 0
        moments = {"prefill_s": 0.001, "first_output_s": 0.002 + 0.003 * is_candidate}
        memory = {"peak_memory_bytes": 2**30 * (1 + row.round % 2), "peak_memory_reason": None}
        return dataclasses.replace(row, **moments, **memory)

    markdown = write(tmp_path, made.speed_run(tmp_path, edit=telling))
    inside = markdown.partition("## Latency")[2].partition("Within a timed call")[2]
    assert row_of(inside, "baseline", "answer", "1")[3:] == ["96", "1.00 ms", "2.00 ms", "2.00 GiB"]
    assert row_of(inside, "block 16", "answer", "1")[3:] == ["96", "1.00 ms", "5.00 ms", "2.00 GiB"]

    on_cpu = write(
        tmp_path / "cpu",
        made.speed_run(
            tmp_path / "cpu",
            edit=lambda row: dataclasses.replace(row, first_output_s=0.002) if isinstance(row, SpeedSample) else row,
        ),
    )
    assert "| prompts read | first output |\n" in on_cpu
    assert "Peak memory" not in on_cpu
    assert row_of(on_cpu.partition("Within a timed call")[2], "baseline")[4:] == [text.NONE, "2.00 ms"]
    assert "Within a timed call" not in markdown_of(usual[2]), "runs that do not tell are not asked"


def test_fixed_workload_resamples_rounds_only(tmp_path) -> None:
    markdown = write(tmp_path, made.speed_run(tmp_path, workload="fixed"))
    assert "Crossed paired bootstrap of 12 rounds, " in markdown
    assert "fixed workload, batch 1, 12 rounds of 8 timed calls" in markdown


def test_rounds_that_are_alike_are_said_to_be_worth_less(tmp_path) -> None:
    """Half of a run in which one arm was slower counted as six rounds of independent evidence."""

    def slower(row):
        late = isinstance(row, SpeedSample) and row.round >= 6 and row.prompts[0].num_denoiser_forwards == 0
        return dataclasses.replace(row, wall_s=row.wall_s * 1.3) if late and row.replica == 0 else row

    markdown = write(tmp_path, made.speed_run(tmp_path, edit=slower))
    assert faster(markdown)["effective rounds (lag-1)"].startswith("1.")
    assert re.search(
        r"12 rounds are worth 1\.\d independent ones, as neighbouring rounds resemble each other", markdown
    )
    assert re.search(r"their standard error is taken \d+\.\d times as large as that of independent ones\.", markdown)


def test_speedup_per_device_is_printed_where_the_arms_use_different_numbers(tmp_path) -> None:
    path = made.speed_run(tmp_path / "a")
    run = store.load(path)
    cells = tuple(
        dataclasses.replace(c, workload=dataclasses.replace(c.workload, num_devices=2 if c.arm == "candidate" else 1))
        for c in run.manifest.cells
    )
    other = made.write(tmp_path / "b", dataclasses.replace(run.manifest, cells=cells), run.speed)
    row = faster(write(tmp_path, other))
    per_device = "S_time per device [95 %]"
    assert float(row[per_device].partition("x")[0]) == pytest.approx(float(row[TIME].partition("x")[0]) / 2, abs=0.011)
    assert per_device not in faster(write(tmp_path, path))


@pytest.mark.parametrize(
    ("factor", "words"),
    [
        (lambda row: 1.05, "INVALID: A/A null: the baseline timed against itself is off by more than 2 %"),
        (lambda row: 1.15 - 0.3 * (row.round % 2), " (allowed: 3.0 %): time more rounds (--min-rounds)"),
    ],
)
def test_a_null_that_is_off_or_too_wide_invalidates(tmp_path, factor, words: str) -> None:
    def slow_down(row):
        copied = isinstance(row, SpeedSample) and row.replica == 1
        return made.taking(row, factor(row)) if copied else row

    assert "INVALID" not in write(tmp_path / "plain", made.speed_run(tmp_path / "plain"))
    markdown = write(tmp_path / "bent", made.speed_run(tmp_path / "bent", edit=slow_down))
    assert words in markdown.partition("## Quality")[0]
    assert "(INVALID, see below)" in sentence(markdown)
    assert faster(markdown)[TIME].endswith("] **INVALID**"), "a row is read without the bullets below it"
    figure = re.compile(r"[1-9][0-9.]*x \[[0-9.]+, [0-9.]+\]")
    null_apart = [line for line in markdown.splitlines() if "against itself" not in line and "A/A null [" not in line]
    for line in null_apart:
        cells = [cell for cell in line.split("|")[:9] if figure.search(cell)]
        assert all("INVALID" in cell for cell in cells), line


def test_launches_are_pooled_unless_the_machine_differs(tmp_path) -> None:
    first = made.speed_run(tmp_path)

    def second(run_id: str, **changes) -> Path:
        def relabel(row):
            return dataclasses.replace(row, launch_id="launch-2")

        return made.speed_run(tmp_path, run_id=run_id, edit=relabel, **changes)

    pooled = write(tmp_path, first, second("20261103T120000Z-speed-cccccc"))
    assert faster(pooled)["rounds x calls"] == "24 x 8"
    assert "2 launches: variation between launches was not measured." in pooled
    machine = {"system": "Linux", "cpu": "Another"}
    apart = write(tmp_path, first, second("20261104T120000Z-speed-dddddd", machine=machine))
    assert faster(apart)["rounds x calls"] == "12 x 8"
    assert apart.count("| answer: four tasks |") == 2


def test_outputs_of_another_length_carry_a_warning(tmp_path) -> None:
    def shorten(row):
        if not isinstance(row, SpeedSample) or row.prompts[0].num_denoiser_forwards == 0:
            return row
        short = [dataclasses.replace(p, num_tokens=p.num_tokens // 2) for p in row.prompts]
        return dataclasses.replace(row, prompts=tuple(short))

    markdown = write(tmp_path, made.speed_run(tmp_path, edit=shorten))
    assert "read the speedup in useful tokens per second " in markdown
    assert faster(markdown)["length ratio [95 %]"].startswith("0.49")


def test_timed_outputs_that_were_scored_stand_in_for_a_run(tmp_path) -> None:
    path = made.speed_run(tmp_path, scored=True)
    markdown = write(tmp_path, path)
    assert "timed outputs, batch 1" in markdown
    assert re.search(
        r"keeps 87\.5 % \[[\d., ]+\] of the baseline's quality on 60 documents at [\d.]+x \[[\d., ]+\] its", markdown
    )
    assert "Retention is that of the timed outputs themselves." in markdown
    whole = made.quality_run(tmp_path)
    assert "Retention is that of the timed outputs themselves." in write(tmp_path, path, whole), "of what was timed"
    unscored = made.speed_run(tmp_path / "unscored")
    assert "Retention is that of the scored run, of whole tasks." in write(tmp_path, unscored, whole)


# --- the sentence --------------------------------------------------------------------------------------------------


def sentence(markdown: str) -> str:
    return next(line for line in markdown.splitlines() if line.startswith("**"))


def test_headline_joins_both_and_says_what_is_missing(usual, tmp_path) -> None:
    run, speed, folder = usual
    number = r"\d+\.\d %? ?\[\d+\.\d, \d+\.\d\]"
    pattern = rf"\*\*pair decoding with block 16, 16 steps, threshold 0\.8 keeps {number} of the baseline's quality "
    pattern += "on 750 documents "
    assert re.match(
        pattern + r".* at \d\.\d\dx \[\d\.\d\d, \d\.\d\d\] its wall-clock speed\.\*\*$", sentence(markdown_of(folder))
    )
    assert "Its speed: not measured; `twotower-eval speed` measures it." in sentence(write(tmp_path, run))
    assert "Its quality: not measured; `twotower-eval run` measures it." in sentence(write(tmp_path, speed))


def test_the_report_is_reproduced_from_where_its_runs_were_made(tmp_path) -> None:
    """Runs made with `--out` were named by their bare id, which `report` looks up in results/ and did not find."""
    argv = ("/usr/bin/twotower-eval", "run", "--tasks", "miniature", "--out", "/tmp/elsewhere/")
    path = made.quality_run(tmp_path, argv=argv)
    last = [line for line in write(tmp_path, path).splitlines() if line.startswith("twotower-eval report ")][-1]
    assert last == f"twotower-eval report /tmp/elsewhere/{path.name}"


def test_headline_without_a_claim_is_the_plans_first_and_not_the_best(swept) -> None:
    markdown = markdown_of(swept)
    assert sentence(markdown).startswith("**pair decoding with block 8, 8 steps, threshold 0.7 keeps")
    assert "The one above is the first of the plan, of those with both retention and speed if any" in markdown
    counted = "18 operating points (decoder settings) were measured: 18 measurements of retention and 36 of speed"
    assert markdown.count(counted) == 1
    best = max(float(x) for x in re.findall(r"\| block [^|]+\| whole tasks \| 4 \| \d+ \| ([\d.]+) %", markdown))
    assert f"keeps {best} %" not in sentence(markdown)


def claim_file(folder: Path, decoder: DecoderSpec, *, batch_size: int = 1, subject: str = "pair") -> str:
    """A joint claim at one operating point, behind a claim of another subject at another point."""
    inside = ", ".join(f"{name} = {json.dumps(value)}" for name, value in decoder.params.items())
    head = f'subject = "{subject}"\nbaseline = "context-tower"\npoint = "here"\nsource = "a test"\n'
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "own.toml"
    path.write_text(
        f"""title = "Ours"
[[point]]
name = "there"
decoder = {{ kind = "block_diffusion", block_size = 64, steps_per_block = 2, threshold = 0.1 }}
[[point]]
name = "here"
decoder = {{ kind = "{decoder.kind}", {inside} }}
batch_size = {batch_size}
num_devices = 1
workload = "answer"
[[claim]]
name = "of another"
subject = "somebody"
baseline = "context-tower"
point = "there"
source = "a test"
quantity = "score"
scope = ["arithmetic"]
expected = 0.5
margin = 0.1
[[claim]]
name = "kept"
{head}quantity = "retention"
scope = ["arithmetic", "sorting"]
expected = 0.99
[[claim]]
name = "fast"
{head}quantity = "speedup_time"
expected = 3.0
[[claim]]
name = "both"
{head}quantity = "joint"
parts = ["kept", "fast"]
""",
        encoding="utf-8",
    )
    return str(path)


def verdict_of(markdown: str) -> str:
    """The verdict's line, above the sentence."""
    return sentence(markdown)


def quoted(markdown: str) -> str:
    """The sentence to quote, below the verdict."""
    return [line for line in markdown.splitlines() if line.startswith("**")][1]


@pytest.mark.parametrize("threshold", [0.7, 0.9])
def test_the_sentence_is_about_the_point_of_the_judged_claim(tmp_path, threshold: float) -> None:
    """A verdict at threshold 0.99 stood above a sentence that quoted 0.8, a constant, at whatever batch came first."""
    decoders = tuple(made.block_diffusion(threshold=value) for value in (0.8, 0.7, 0.9))
    runs = [
        made.quality_run(tmp_path, decoders=decoders, num_docs=40),
        made.speed_run(tmp_path, decoders=decoders, batch_sizes=(1, 4), num_rounds=3, num_calls=4),
    ]
    claims = claim_file(tmp_path, made.block_diffusion(threshold=threshold), batch_size=4)
    markdown = write(tmp_path, *runs, claims=claims)
    assert f"at 16/16/{threshold} (block/steps/threshold), batch 4, answer workload: " in verdict_of(markdown)
    assert quoted(markdown).startswith(f"**pair decoding with block 16, 16 steps, threshold {threshold} keeps")
    at_batch = named_at(markdown, f"block 16, 16 steps, threshold {threshold}", batch="4")
    assert f"at {at_batch} its wall-clock speed" in quoted(markdown)
    assert "Speed: answer workload, batch 4, " in markdown
    assert "The one above is the claim's own, picked without a look at its result" in markdown
    assert "- The claim does not cover choice, words, which this figure takes in.\n" in markdown
    assert markdown.index(f"### block 16, 16 steps, threshold {threshold}") == markdown.index("### block 16")


def named_at(markdown: str, point: str, *, batch: str) -> str:
    """The wall-clock speedup of a point at a batch size."""
    rows = re.findall(
        rf"^\| {re.escape(point)} \| ([^|]+?)(?: \*\*INVALID\*\*)? \|[^|]+\|[^|]+\| {batch} \|", markdown, re.M
    )
    assert len(rows) == 1
    return rows[0]


def test_a_claim_whose_point_was_not_measured_has_nothing_quoted_in_its_place(tmp_path) -> None:
    runs = made.quality_run(tmp_path, num_docs=40), made.speed_run(tmp_path, num_rounds=3, num_calls=4)
    claims = claim_file(tmp_path, made.block_diffusion(threshold=0.99))
    markdown = write(tmp_path, *runs, claims=claims)
    assert verdict_of(markdown).startswith("**NOT MEASURED**: claim both")
    assert quoted(markdown).startswith("**Nothing to quote: the claim's operating point was not measured (pair, ")
    assert "threshold 0.99, batch 1, workload answer, devices 1).**" in quoted(markdown)
    assert quoted(markdown).endswith("The tables begin with another, block 16, 16 steps, threshold 0.8.")
    assert not re.search(r"\d %|\dx", quoted(markdown))


def test_a_speed_at_another_batch_is_not_the_claims(tmp_path) -> None:
    runs = made.quality_run(tmp_path, num_docs=40), made.speed_run(tmp_path, num_rounds=3, num_calls=4)
    markdown = write(tmp_path, *runs, claims=claim_file(tmp_path, made.block_diffusion(), batch_size=4))
    assert "Its speed: not measured as the claim has it (batch 4, workload answer, devices 1)" in quoted(markdown)
    assert "wall-clock speed" not in quoted(markdown)


def test_the_point_of_any_decoder_is_all_its_parameters(tmp_path) -> None:
    decoders = tuple(
        DecoderSpec(kind="skipping", params={"width": width, "block_size": 16, "steps_per_block": 16, "threshold": 0.8})
        for width in (2, 4)
    )
    run = made.quality_run(tmp_path, decoders=decoders, num_docs=40)
    markdown = write(tmp_path, run, claims=claim_file(tmp_path, decoders[1]))
    assert quoted(markdown).startswith(
        "**pair decoding with block 16, 16 steps, threshold 0.8, skipping, width 4 keeps"
    )


def test_the_headline_without_a_claim_is_the_first_with_both_quality_and_speed(tmp_path) -> None:
    decoders = (made.block_diffusion(32), made.block_diffusion(8))
    runs = made.quality_run(tmp_path, decoders=decoders, num_docs=40), made.speed_run(tmp_path, decoders=decoders)
    assert "decoding with block 32, 32 steps" in sentence(write(tmp_path, *runs))
    second = made.speed_run(tmp_path / "second", decoders=decoders[1:])
    assert "decoding with block 8, 8 steps" in sentence(write(tmp_path, runs[0], second))


def test_a_sweep_lists_every_point_and_every_task_of_it(swept) -> None:
    markdown = markdown_of(swept)
    assert len(re.findall(r"^\| block \d+, \d+ steps, threshold 0\.\d \| whole tasks \|", markdown, re.M)) == 18
    assert len(re.findall(r"^\| arithmetic \| \d[\d.]* %", markdown, re.M)) == 18
    assert len(re.findall(r"^\| block [^|]+\|[^|]+x [^|]+\|[^|]+\| answer: ", markdown, re.M)) == 36


# --- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["doc_sha256", "prompt_sha256", "target_sha256", "cluster_id"])
def test_arms_with_other_documents_are_no_pair(tmp_path, name: str) -> None:
    spoilt = set()

    def spoil(row):
        if isinstance(row, Score) and (row.task, row.doc_id) == ("sorting", 3) and not spoilt:
            spoilt.add(row.cell)
            return dataclasses.replace(row, **{name: "other"})
        return row

    path = made.quality_run(tmp_path, edit=spoil)
    with pytest.raises(ValueError, match=f"task 'sorting', document 3: {name} differs") as caught:
        write(tmp_path, path)
    assert "\n" not in str(caught.value)


def test_a_document_scored_in_one_arm_only_is_refused(tmp_path) -> None:
    dropped: list[Score] = []

    def cut(row):
        last = isinstance(row, Score) and (row.task, row.doc_id) == ("sorting", 149)
        return None if last and drop(row) else row

    def drop(row: Score) -> bool:
        dropped.append(row)
        return len(dropped) == 2  # the candidate's

    path = made.quality_run(tmp_path, edit=cut)
    with pytest.raises(ValueError, match="'sorting', document 149, metric 'exact_match' is scored in one arm only"):
        write(tmp_path, path)


def test_arms_timed_on_other_prompts_are_no_pair(tmp_path) -> None:
    def rename(row):
        if isinstance(row, SpeedSample) and row.prompts[0].num_denoiser_forwards and row.call_id == "0":
            return dataclasses.replace(row, prompts=(dataclasses.replace(row.prompts[0], prompt_id="other"),))
        return row

    with pytest.raises(ValueError, match="timed on different prompts"):
        write(tmp_path, made.speed_run(tmp_path, edit=rename))


def test_timed_generations_of_other_prompts_are_no_pair(tmp_path) -> None:
    def other_prompt(row):
        if isinstance(row, GenerationRow) and row.generation.num_denoiser_forwards and row.doc_id == 5:
            return dataclasses.replace(row, prompt_sha256="other")
        return row

    with pytest.raises(ValueError, match="task 'sorting', document 5: prompt_sha256 differs between timed"):
        write(tmp_path, made.speed_run(tmp_path, scored=True, edit=other_prompt))


def test_two_headline_scores_for_one_task_are_refused(tmp_path) -> None:
    def both(row):
        return dataclasses.replace(row, headline=True) if getattr(row, "metric", "") == "acc_norm" else row

    with pytest.raises(ValueError, match="'choice' has several headline scores"):
        write(tmp_path, made.quality_run(tmp_path, edit=both))


def test_no_runs_same_run_twice_and_unknown_sections_are_refused(usual, tmp_path) -> None:
    with pytest.raises(ValueError, match="no run to report on"):
        report.write([], tmp_path)
    with pytest.raises(ValueError, match="named twice"):
        report.write([usual[0], usual[0]], tmp_path)
    with pytest.raises(ValueError, match=r"report section 'lattency' is unknown; did you mean latency\?"):
        report.write([usual[0]], tmp_path, sections=["lattency"])


# --- what is missing -----------------------------------------------------------------------------------------------


def test_missing_scores_are_left_out_of_both_arms_and_listed(tmp_path) -> None:
    def lose(row):
        if isinstance(row, Score) and row.task == "sorting" and row.doc_id in (3, 4) and row.cell == candidate.id:
            return dataclasses.replace(row, value=None, missing_reason="the sandbox | timed out")
        return row

    work = store.load(made.quality_run(tmp_path / "whole")).manifest.cells
    candidate = next(c for c in work if c.arm == "candidate" and c.workload.name == "sorting")
    markdown = write(tmp_path, made.quality_run(tmp_path / "cut", edit=lose))
    assert kept(markdown, "sorting")["n (clusters)"] == "148 (148)"
    assert "2 documents left out of both arms: no headline score in one of them" in markdown
    assert "2 of the candidate's (headline; documents 3, 4): the sandbox \\| timed out" in markdown


def test_metrics_without_values_per_document_do_not_cry_wolf(tmp_path) -> None:
    def lose(row):
        if isinstance(row, Score) and row.metric == "acc_norm":
            return dataclasses.replace(row, value=None, missing_reason="for the whole task only")
        return row

    markdown = write(tmp_path, made.quality_run(tmp_path, edit=lose))
    assert "no headline score" not in markdown
    assert "choice, acc_norm: 150 of the baseline's: for the whole task only" in markdown


def test_an_unfinished_run_says_so_first(tmp_path) -> None:
    seen: list[Score] = []

    def stop_early(row):
        seen.append(row)
        return row if len(seen) < 400 else None

    path = made.quality_run(tmp_path, complete=False, edit=stop_early, tasks=["arithmetic"], perplexity=False)
    markdown = write(tmp_path, path)
    assert "> **INCOMPLETE: run `20261101T120000Z-run-aaaaaa` has not finished.**" in markdown
    assert "left out: not yet in the other arm" in markdown
    assert kept(markdown, "arithmetic")["n (clusters)"].startswith("50 ")


def test_an_unfinished_speed_run_uses_whole_rounds_only(tmp_path) -> None:
    def late(row):
        return None if isinstance(row, SpeedSample) and row.round == 11 and row.call_id == "7" else row

    markdown = write(tmp_path / "a", made.speed_run(tmp_path / "a", complete=False, edit=late))
    assert faster(markdown)["rounds x calls"] == "11 x 8"
    assert "1 round left out: not complete in both arms" in markdown

    def first(row):
        return None if isinstance(row, SpeedSample) and row.call_id == "7" and row.replica == 0 else row

    cut = made.speed_run(tmp_path / "b", complete=False, num_rounds=1, edit=lambda r: drop_candidate(r, first))
    markdown = write(tmp_path / "b", cut)
    assert "has no complete measured round" in markdown
    assert "nothing to quote" in markdown


def drop_candidate(row, other):
    denoised = isinstance(row, SpeedSample) and row.prompts[0].num_denoiser_forwards > 0
    return other(row) if denoised else row


def test_one_round_gives_no_interval_and_no_number(tmp_path) -> None:
    markdown = write(tmp_path, made.speed_run(tmp_path, num_rounds=1))
    assert faster(markdown)[TIME] == text.NONE
    assert "one measured round only" in markdown


def test_a_null_that_was_not_measured_is_said_to_be_missing(tmp_path) -> None:
    def alone(row):
        return None if isinstance(row, SpeedSample) and row.replica == 1 else row

    markdown = write(tmp_path, made.speed_run(tmp_path, edit=alone))
    assert faster(markdown)["A/A null [99 %]"] == text.NONE
    assert "the baseline was not timed against itself" in markdown


def test_one_model_alone_still_has_its_scores_tabled(tmp_path) -> None:
    run = store.load(made.quality_run(tmp_path / "pair"))
    kept = [cell for cell in run.manifest.cells if cell.arm == "baseline"]
    ids = {cell.id for cell in kept}
    header = dataclasses.replace(run.manifest, cells=tuple(kept))
    path = made.write(tmp_path / "alone", header, [score for score in run.scores if score.cell in ids])
    markdown = write(tmp_path, path)
    assert "**pair (context tower), autoregressive, measured alone: " in markdown
    values = scores_of(path, "baseline", "arithmetic")
    low = 1 - stats.binomial_upper_bound(int(150 - values.sum()), 150, 0.025)
    assert row_of(markdown, "arithmetic", "exact")[6].startswith(f"{values.mean():.4f} [{low:.4f}, ")


def test_a_baseline_of_zero_is_a_reason_and_not_a_number(tmp_path) -> None:
    def zero(row):
        wrong = isinstance(row, Score) and row.task == "sorting" and row.cell in bases
        return dataclasses.replace(row, value=0.0) if wrong else row

    whole = store.load(made.quality_run(tmp_path / "whole"))
    bases = {cell.id for cell in whole.manifest.cells if cell.arm == "baseline"}
    markdown = write(tmp_path, made.quality_run(tmp_path / "zero", edit=zero))
    assert kept(markdown, "sorting")[KEPT] == text.NONE
    assert "sorting: no retention, the baseline scores 0 everywhere" in markdown


# --- pictures, bytes, provenance -----------------------------------------------------------------------------------


def chunks(png: bytes) -> list[str]:
    assert png[:8] == b"\x89PNG\r\n\x1a\n"
    names, at = [], 8
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        names.append(png[at + 4 : at + 8].decode())
        at += 12 + length
    return names


def test_a_sweep_draws_a_picture_for_each_setting(swept) -> None:
    pictures = {"tradeoff.png", "over_block_size.png", "over_steps_per_block.png", "over_threshold.png"}
    assert {file.name for file in swept.iterdir()} == {"report.md", *pictures}
    markdown = markdown_of(swept)
    for name in pictures:
        assert f"({name})" in markdown
        assert set(chunks((swept / name).read_bytes())) == {"IHDR", "pHYs", "IDAT", "IEND"}  # no dates, no versions


def test_one_value_is_a_line_of_text_and_no_picture(usual) -> None:
    markdown = markdown_of(usual[2])
    assert "Over block size (tokens): only 16 was measured, so there is no plot." in markdown
    assert {file.name for file in usual[2].iterdir()} == {"report.md", "tradeoff.png"}


def lines_over(name: str, *paths: Path) -> dict[str, list[tuple[str, list[tuple[float, float]]]]]:
    """By measure, every series over a setting: what it was measured on, and its points."""
    found = {}
    for measure in measures(Runs([store.load(path) for path in paths])):
        drawn = [one for own in measure.series(name).values() for one in own]
        found[measure.label.partition(" ")[0]] = [
            (text.measured_on_words(one.on), [(x, figure.value) for x, figure in one.figures]) for one in drawn
        ]
    return found


def test_a_line_joins_what_was_measured_on_the_same_documents_and_outputs(tmp_path) -> None:
    """A retention on 1,800 documents of whole tasks was joined to one on 128 timed answers of other tasks."""
    eager, usual = made.block_diffusion(steps=4), made.block_diffusion(steps=16)
    whole = made.quality_run(tmp_path, decoders=[usual], num_docs=40)
    timed = made.speed_run(tmp_path, decoders=[eager, usual], num_rounds=3, num_calls=4, scored=True)
    kept = lines_over("steps_per_block", whole, timed)["retention"]
    both = "60 documents of 1 task, timed at batch 1"
    assert [(on, [x for x, _ in points]) for on, points in kept] == [
        ("200 documents of 4 tasks", [16.0]),
        (both, [4.0, 16.0]),
    ]
    [(_, [(_, alone)]), (_, [_, (_, of_timed)])] = kept
    assert alone != of_timed
    # One point of each kind: nothing to join.
    apart = made.speed_run(tmp_path / "apart", decoders=[eager], num_rounds=3, num_calls=4, scored=True)
    kept = lines_over("steps_per_block", whole, apart)["retention"]
    assert [(on, [x for x, _ in points]) for on, points in kept] == [
        ("200 documents of 4 tasks", [16.0]),
        (both, [4.0]),
    ]
    markdown = write(tmp_path, whole, apart)
    assert "measured on the same documents, tasks and kind of outputs in one run; others stand alone" in markdown


@pytest.mark.parametrize("other", ["documents", "tasks", "run", "checkpoint"])
def test_no_line_joins_other_documents_tasks_runs_or_checkpoints(tmp_path, other: str) -> None:
    eager, usual = made.block_diffusion(steps=4), made.block_diffusion(steps=16)
    first = made.quality_run(tmp_path, decoders=[eager], num_docs=40)
    options = {"num_docs": 39} if other == "documents" else {"tasks": ["arithmetic"]} if other == "tasks" else {}
    second = made.quality_run(
        tmp_path, decoders=[usual], run_id="20261103T120000Z-run-cccccc", **{"num_docs": 40, **options}
    )
    if other == "checkpoint":
        second = renamed(second, tmp_path / "renamed")
    kept = lines_over("steps_per_block", first, second)["retention"]
    assert [len(points) for _, points in kept] == [1, 1]
    joined = made.quality_run(tmp_path / "together", decoders=[eager, usual], num_docs=40)
    assert [len(points) for _, points in lines_over("steps_per_block", joined)["retention"]] == [2]


def renamed(path: Path, root: Path, arm: str = "candidate", **changes: Any) -> Path:
    """The run of another candidate, or baseline."""
    run = store.load(path)
    cells = tuple(
        dataclasses.replace(cell, checkpoint=dataclasses.replace(cell.checkpoint, **(changes or {"digest": "f" * 64})))
        if cell.arm == arm
        else cell
        for cell in run.manifest.cells
    )
    return made.write(
        root, dataclasses.replace(run.manifest, cells=cells), [*run.scores, *run.generations, *run.likelihoods]
    )


def test_two_checkpoints_have_their_own_lines_in_a_sweep(tmp_path) -> None:
    decoders = [made.block_diffusion(steps=4), made.block_diffusion(steps=16)]
    first = made.quality_run(tmp_path, decoders=decoders, num_docs=40)
    other = made.quality_run(tmp_path, decoders=decoders, num_docs=40, run_id="20261103T120000Z-run-cccccc")
    kept = lines_over("steps_per_block", first, renamed(other, tmp_path / "renamed"))["retention"]
    assert [[x for x, _ in points] for _, points in kept] == [[4.0, 16.0]] * 2


def configs(content: str) -> tuple[FileDigest, ...]:
    return (FileDigest(name="config.json", sha256=sha256_text(content)),)


@pytest.mark.parametrize("arm", ["candidate", "baseline"])
def test_no_line_joins_two_configs_of_equal_tensors(tmp_path, arm: str) -> None:
    """Lines went by the tensors, so that another config.json of a folder lay on the line of the first."""
    eager, usual = made.block_diffusion(steps=4), made.block_diffusion(steps=16)
    paths = []
    for name, decoder, run_id in (("one", eager, made.RUN_ID), ("other", usual, "20261103T120000Z-run-cccccc")):
        path = made.quality_run(tmp_path, decoders=[decoder], num_docs=40, run_id=run_id)
        paths.append(renamed(path, tmp_path / "renamed", arm, files=configs(name)))
    kept = lines_over("steps_per_block", *paths)["retention"]
    assert [len(points) for _, points in kept] == [1, 1]
    cells = [cell for path in paths for cell in store.load(path).manifest.cells if cell.arm == "candidate"]
    labels = list(families("steps_per_block", cells).values())
    if arm == "candidate":
        assert [label.partition(":")[0] for label in labels] == [
            f"pair {cell.checkpoint.identity[:8]}" for cell in (cells[0], cells[-1])
        ]
    else:
        assert labels == ["block 16, threshold 0.8"]


def test_invalid_timings_are_crossed_in_a_sweep(tmp_path) -> None:
    def slow_down(row):
        copied = isinstance(row, SpeedSample) and row.replica == 1
        return dataclasses.replace(row, wall_s=1.1 * row.wall_s) if copied else row

    decoders = [made.block_diffusion(steps=4), made.block_diffusion(steps=16)]
    options = {"decoders": decoders}
    said = "Points whose timing is INVALID are crossed. Runs"
    assert said not in write(tmp_path / "a", made.speed_run(tmp_path / "a", **options))
    bent = made.speed_run(tmp_path / "b", edit=slow_down, **options)
    assert said in write(tmp_path / "b", bent)
    [_, faster, _] = measures(Runs([store.load(bent)]))
    [[series]] = faster.series("steps_per_block").values()
    assert [figure.invalid for _, figure in series.figures] == [True, True]


def test_steps_that_only_follow_the_block_size_are_no_sweep_of_steps(tmp_path) -> None:
    decoders = tuple(made.block_diffusion(block_size) for block_size in (8, 16))
    markdown = write(tmp_path, made.quality_run(tmp_path, decoders=decoders, num_docs=40))
    assert "Over steps per block: 8, 16 were measured, but never with the other settings kept" in markdown
    assert "(over_block_size.png)" in markdown
    assert "No operating point has both a retention and a speedup" in markdown


def test_the_same_runs_give_the_same_bytes_in_any_order_and_process(usual, tmp_path) -> None:
    run, speed, folder = usual
    code = "import sys; from pathlib import Path; from twotower_eval.analyse import report; "
    code += "print(report.write([Path(p) for p in sys.argv[2:]], Path(sys.argv[1])))"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "MPLBACKEND": "svg"}
    command = [sys.executable, "-c", code, str(tmp_path), str(speed), str(run)]
    again = Path(subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.strip())
    assert again.name == folder.name
    assert sorted(f.name for f in again.iterdir()) == sorted(f.name for f in folder.iterdir())
    for file in folder.iterdir():
        assert (again / file.name).read_bytes() == file.read_bytes(), file.name


def test_a_report_needs_neither_torch_nor_lm_eval(usual, tmp_path) -> None:
    code = "import sys; from pathlib import Path; from twotower_eval.analyse import report; "
    code += "report.write([Path(p) for p in sys.argv[2:]], Path(sys.argv[1])); "
    code += "print(*{name.split('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", code, str(tmp_path), str(usual[0]), str(usual[1])]
    loaded = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert "matplotlib" in loaded
    assert not loaded & {"torch", "lm_eval", "transformers", "datasets"}


def test_report_ids() -> None:
    assert report.report_id([made.RUN_ID]) == made.RUN_ID
    both = report.report_id([made.SPEED_ID, made.RUN_ID])
    assert both == report.report_id([made.RUN_ID, made.SPEED_ID])
    assert re.fullmatch(r"20261102T120000Z-run-speed-[0-9a-f]{6}", both)


def test_provenance_names_everything(usual) -> None:
    markdown = markdown_of(usual[2])
    for expected in (
        made.PAIR.digest,
        made.CONTEXT.digest,
        "pair (context tower)",
        "0123456789abcdef0123456789abcdef01234567",
        "cpu Some CPU \\| 3 GHz",
        "torch 2.9.0",
        "seed 7",
        "arithmetic 150 documents",
        "8 prompts timed in batches of 1",
        "twotower-eval run --tasks arithmetic,sorting,words,choice --seed 7 --out 'my results'",
        "twotower-eval speed --tasks arithmetic,sorting,words,choice --seed 7 --out 'my results'",
        f"twotower-eval report 'my results/{made.RUN_ID}' 'my results/{made.SPEED_ID}'",
    ):
        assert expected in markdown


def test_names_cannot_break_out_of_their_place(tmp_path) -> None:
    run = store.load(made.quality_run(tmp_path / "plain", num_docs=30))
    evil = "a|b <script>`$x$ [l](u)\n# no"
    swap = {cell.id: dataclasses.replace(cell.checkpoint, name=evil, source=evil) for cell in run.manifest.cells}
    cells = tuple(dataclasses.replace(cell, checkpoint=swap[cell.id]) for cell in run.manifest.cells)
    argv, plan = ("/home/me/bin/twotower-eval", "```", "x\ny"), {"tasks": ["```", "x\ny"]}
    header = dataclasses.replace(run.manifest, cells=cells, argv=argv, plan=plan)
    rows = [*run.scores, *run.generations, *run.likelihoods]
    markdown = write(tmp_path, made.write(tmp_path / "evil", header, rows))
    assert "<script" not in markdown
    assert "\n# no" not in markdown
    assert "a\\|b &lt;script&gt;" in markdown
    assert "/home/me" not in markdown
    assert markdown.count("```sh") == 1
    assert "\n```\n" in markdown.partition("```sh")[2]


def marker(runs: Runs) -> Section:
    return Section(title="Mine", markdown=f"{len(runs)} runs, {len(runs.quality)} points", files={"mine.txt": b"x"})


def test_a_section_of_ones_own(usual, tmp_path) -> None:
    sections = ["headline", f"{__name__}:marker"]
    folder = report.write(usual[:2], tmp_path, sections=sections)
    assert re.findall("^## (.*)", markdown_of(folder), re.M)[-1] == "Mine"
    assert "## Mine\n\n2 runs, 1 points\n" in markdown_of(folder)
    assert (folder / "mine.txt").read_bytes() == b"x"
    with pytest.raises(ValueError, match=r"two sections of the report write mine\.txt"):
        report.write(usual[:2], tmp_path, sections=[sections[1]] * 2)


# --- formats -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.012345, "0.0123"),
        (4.5678, "4.57"),
        (99.96, "100"),
        (12345.0, "12,300"),
        (4.818e13, "4.82e+13"),
        (0.0, "0"),
        (9.999, "10.0"),
    ],
)
def test_significant_digits(value: float, shown: str) -> None:
    assert text.significant(value) == shown


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.0, "1.0"), (0.0123, "0.012"), (1e-4, "0.00010"), (9.99e-5, "&lt; 0.0001"), (7e-49, "&lt; 0.0001")],
)
def test_a_tiny_p_is_said_to_be_below_what_is_told_apart(value: float, shown: str) -> None:
    """7e-49 was printed as 0.00010."""
    assert text.p_value(value) == shown


def test_a_tiny_p_stands_in_the_table_so_and_whole_in_the_frame(tmp_path) -> None:
    def lost(row):
        return dataclasses.replace(row, value=0.0) if isinstance(row, Score) and row.cell in candidates else row

    first = store.load(made.quality_run(tmp_path / "a", tasks=("arithmetic",), perplexity=False))
    candidates = {cell.id for cell in first.manifest.cells if cell.arm == "candidate"}
    run = made.quality_run(tmp_path / "b", tasks=("arithmetic",), perplexity=False, edit=lost)
    folder = report.write([run], tmp_path / "out", sections=["quality"], csv=True)
    assert " / 0 (&lt; 0.0001) |" in (folder / "report.md").read_text()
    assert any(re.search(r",[0-9.]+e-[1-9][0-9],", file.read_text()) for file in (folder / "tables").glob("*.csv"))


def test_intervals_have_as_many_digits_as_they_deserve() -> None:
    def estimate(value: float, low: float, high: float) -> Measured:
        return Measured(estimate=Estimate(value=value, low=low, high=high, level=0.95, n=9, method="any"))

    assert text.retention(estimate(0.9867, 0.97, 1.003)) == "98.7 % [97.0, 100.3]"
    assert text.retention(estimate(0.9867, 0.9862, 0.9872)) == "98.67 % [98.62, 98.72]"
    assert text.times(estimate(2.4234, 2.3, 2.5)) == "2.42x [2.30, 2.50]"
    assert text.times(estimate(1.0012, 0.9954, 1.0071)) == "1.001x [0.995, 1.007]"
    assert text.times(estimate(2.0, 0.0, 87582306.46)) == "2.00x [0.00, over 1000]"
    assert text.rate(estimate(1234.5, 1200, 1250)) == "1,230 [1,200, 1,250]"
    assert text.retention(Measured(estimate=None, reason="none")) == text.NONE
    assert (text.seconds(0.0123), text.seconds(2.3456)) == ("12.3 ms", "2.35 s")
