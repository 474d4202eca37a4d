"""What a report is beside its Markdown: one HTML page, CSV tables, published copies, traces and texts in it."""

import dataclasses
import html.parser
import io
import json
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import report_fixture as made
from hypothesis import given
from hypothesis import strategies as st

from twotower_eval import store
from twotower_eval.analyse import report
from twotower_eval.analyse.report.answers import Committed, committed
from twotower_eval.analyse.report.page import page
from twotower_eval.analyse.report.provenance import plain_argv
from twotower_eval.analyse.report.rendering import table
from twotower_eval.analyse.report.text import details, escape, lines_of, with_commands
from twotower_eval.cli import main
from twotower_eval.records import Check, CommitStep, GenerationRow, Score, SpeedSample, to_json

EVIL = [
    "<script>alert(1)</script>",
    "</td></table><img src=x onerror=alert(1)>",
    "</details><details open ontoggle=alert(1)><summary>x</summary>",
    "<details><summary>y</summary>",
    "[click](javascript:alert(1)) ![p](https://evil.example/p.png) <https://evil.example>",
    "&lt;script&gt;`</code>`|a|\n\n# heading",
    "[r]: https://evil.example 'x'",
    '"><svg onload=alert(1)>',
]


class Marks(html.parser.HTMLParser):
    """Every tag with its attributes, and the text outside of ``style``."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] != "style":
            self.text += data


def assert_harmless(text: str) -> Marks:
    found = Marks(text)
    for tag, attributes in found.tags:
        assert tag not in {"script", "svg", "iframe", "object", "embed", "link", "form", "base"}, tag
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert str(attributes.get("src", "data:")).startswith("data:image/png;base64,") or "src" not in attributes
        assert str(attributes.get("href", "#")).startswith("#"), attributes
    return found


def traced(row):
    """The first documents of each generating task with a trace that agrees with their counts."""
    if isinstance(row, GenerationRow) and row.generation.num_denoiser_forwards and row.doc_id < 2:
        steps = [
            CommitStep(
                block=block,
                step=step,
                positions=tuple(range(step * 4, step * 4 + 4)),
                token_ids=(1, 2, 3, 4),
                confidences=(0.9, 0.8, 0.5, 0.99),
                num_forced=1,
            )
            for block in range(2)
            for step in range(4)
        ]
        return dataclasses.replace(row, generation=dataclasses.replace(row.generation, trace=tuple(steps)))
    return row


def worded(row):
    """Model texts that try to break out of their place."""
    if isinstance(row, GenerationRow):
        score = str(row.generation.text).split()[0]  # equal answers have equal scores
        text = EVIL[row.doc_id % len(EVIL)] + f"\n    indented {row.doc_id} {score}"
        return dataclasses.replace(row, generation=dataclasses.replace(row.generation, text=text))
    return row


@pytest.fixture(scope="module")
def usual(tmp_path_factory) -> tuple[Path, Path, Path]:
    """A run with traces and evil texts, a speed run, and the folder of their report in all formats."""
    root = tmp_path_factory.mktemp("formats")
    run = made.quality_run(root / "results", num_docs=60, edit=lambda row: traced(worded(row)))
    speed = made.speed_run(root / "results", num_rounds=3, num_calls=4)
    return run, speed, report.write([run, speed], root / "reports", html=True, csv=True)


def read(folder: Path, name: str) -> str:
    return (folder / name).read_text(encoding="utf-8")


# --- one page ------------------------------------------------------------------------------------------------------


def test_the_page_holds_everything_and_asks_for_nothing(usual) -> None:
    text = read(usual[2], "report.html")
    found = assert_harmless(text)
    pictures = [attributes for tag, attributes in found.tags if tag == "img"]
    assert len(pictures) == len(list(usual[2].glob("*.png"))) >= 2
    assert all(picture["alt"] for picture in pictures)
    assert 'name="viewport"' in text
    assert "prefers-color-scheme: dark" in text
    assert "default-src 'none'" in text
    assert not re.search(r"https?://(?!evil\.example)", text)
    for tag in ("table", "details", "summary", "div"):
        assert len(re.findall(rf"<{tag}[ >]", text)) == text.count(f"</{tag}>") > 0, tag


def test_model_text_is_shown_and_is_nothing_but_text(usual) -> None:
    """Texts of flipped answers stand in a table cell each, whatever they hold."""
    markdown, found = read(usual[2], "report.md"), Marks(read(usual[2], "report.html"))
    assert "<script" not in markdown
    assert "alert(1)" in found.text
    flips = markdown.partition("## Flips")[2].partition("\n## ")[0]
    assert "&nbsp;&nbsp;&nbsp;&nbsp;indented" in flips
    rows = [line for line in flips.splitlines() if "**lost**" in line or "**gained**" in line]
    assert rows
    assert all(len(re.findall(r"(?<!\\)\|", row)) == 4 for row in rows)


@pytest.mark.parametrize("text", EVIL)
def test_names_in_any_place_stay_text(text: str) -> None:
    rows = [[escape(text), lines_of(text), "1"]]
    body = details(text, table(["a", "model says", "n"], rows))
    for markdown in (f"# {escape(text)}\n\n## {escape(text)}\n\n{body}", f"# t\n\n{text}\n", f"# t\n\n- {text}"):
        assert_harmless(page(markdown, {}))


@given(st.text(alphabet=st.sampled_from("<>/&\"'`|[]()!#*_~ \n\\detailsumrycpo=:x"), max_size=60))
def test_no_text_becomes_a_mark(text: str) -> None:
    found = assert_harmless(page(f"# t\n\n{details(text, table(['a', 'b'], [[lines_of(text), escape(text)]]))}", {}))
    assert [tag for tag, _ in found.tags if tag in ("details", "table", "summary")] == ["details", "summary", "table"]
    assert [tag for tag, _ in found.tags].count("td") == 2


def test_raw_html_of_a_section_of_ones_own_is_text() -> None:
    text = page("# t\n\n<b onclick=x>hi</b>\n\n<div>\n<details><summary>ok</summary>\n\nx\n\n</details>\n</div>\n", {})
    assert_harmless(text)
    assert "&lt;b onclick=x&gt;" in text
    assert "<details><summary>ok</summary>" in text
    assert "<div>" not in text


def test_only_the_reports_own_pictures_are_shown() -> None:
    text = page("# t\n\n![mine](a.png) ![other](../b.png)\n", {"a.png": b"\x89PNG"})
    assert text.count("<img ") == 1
    assert ">other" not in text
    assert " other" in text


# --- tables --------------------------------------------------------------------------------------------------------


def frame(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(read(folder / "tables", name)))


def test_tables_hold_the_raw_numbers(usual) -> None:
    run, _, folder = usual
    kept = frame(folder, "retention.csv").set_index("task")
    rows = [s for s in store.load(run).scores if s.task == "arithmetic" and s.headline]
    cells = store.load(run).cells
    means = {arm: np.mean([s.value for s in rows if cells[s.cell].arm == arm]) for arm in ("baseline", "candidate")}
    assert kept.loc["arithmetic", "retention"] == pytest.approx(means["candidate"] / means["baseline"], abs=1e-15)
    assert kept.loc["arithmetic", "candidate_mean"] == means["candidate"]
    assert {"(headline)", "(decoder_exercised)", "(mean_of_ratios)"} <= set(kept.index)
    faster = frame(folder, "speed.csv")
    assert faster["time_speedup_low"][0] < faster["time_speedup"][0] < faster["time_speedup_high"][0]
    assert f"{faster['time_speedup'][0]:.2f}x" in read(folder, "report.md")


def test_samples_and_flips_agree_with_the_scores(usual) -> None:
    run, _, folder = usual
    samples, flips = frame(folder, "documents.csv"), frame(folder, "flips.csv")
    num_scored = len({(s.task, s.doc_id) for s in store.load(run).scores if s.headline})
    assert len(samples) == num_scored
    changed = samples[samples.baseline_score != samples.candidate_score]
    assert len(changed) == len(flips) > 0
    assert set(flips.change) == {"lost", "gained"}
    kept = frame(folder, "retention.csv")
    assert (flips.change == "lost").sum() == kept.num_lost.sum()
    assert flips.baseline_text.str.contains("alert").any()  # whole and unescaped: a table is data


def test_a_missing_number_is_an_empty_field_with_its_reason(tmp_path) -> None:
    folder = report.write([made.speed_run(tmp_path, num_rounds=1)], tmp_path / "reports", csv=True)
    row = frame(folder, "speed.csv").iloc[0]
    assert np.isnan(row["time_speedup"])
    assert "one measured round" in row["time_speedup_missing_reason"]


def test_all_formats_are_the_same_bytes_again(usual, tmp_path) -> None:
    run, speed, folder = usual
    again = report.write([speed, run], tmp_path, html=True, csv=True)
    names = sorted(file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    assert names == sorted(file.relative_to(again) for file in again.rglob("*") if file.is_file())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in names)


# --- traces and fronts ---------------------------------------------------------------------------------------------


def test_traces_are_drawn_one_of_each_task_first(usual) -> None:
    assert (usual[2] / "traces.png").is_file()
    assert "(traces.png)" in read(usual[2], "report.md")


def test_positions_of_a_trace_count_over_blocks() -> None:
    step = CommitStep(block=2, step=3, positions=(0, 5), token_ids=(7, 8), confidences=(0.5, 1.0), num_forced=0)
    assert list(committed([step], 16)) == [
        Committed(position=32, step=3, confidence=0.5),
        Committed(position=37, step=3, confidence=1.0),
    ]


def test_fast_and_broken_is_said(tmp_path) -> None:
    def broken(row):
        wrong = isinstance(row, Score) and row.headline and row.cell in candidates
        return dataclasses.replace(row, value=0.0) if wrong else row

    plain = store.load(made.quality_run(tmp_path / "plain", decoders=DECODERS, num_docs=40))
    cells = plain.manifest.cells
    candidates = {c.id for c in cells if c.arm == "candidate" and c.decoder.params["block_size"] == 32}
    run = made.quality_run(tmp_path / "bad", decoders=DECODERS, num_docs=40, edit=broken)
    speed = made.speed_run(tmp_path, decoders=DECODERS, num_rounds=3, num_calls=4)
    markdown = read(report.write([run, speed], tmp_path / "reports"), "report.md")
    section = markdown.partition("**Fast and broken**")[2].partition("![")[0]
    assert "- block 32, 32 steps" in section
    assert "- block 16" not in section


DECODERS = (made.block_diffusion(16), made.block_diffusion(32))


# --- gates ---------------------------------------------------------------------------------------------------------


def verify_run(root: Path) -> Path:
    workload = made.Workload(kind="checks", name="checks", digest="0" * 64)
    cell = made.make_cell("candidate", made.block_diffusion(), workload)
    header = made.manifest("20261103T120000Z-verify-cccccc", "verify", [cell])
    with store.create(root, header) as writer:
        writer.append(Check(cell=cell.id, name="finite_logits", outcome="passed", detail="all <finite>"))
        writer.append(Check(cell=cell.id, name="batch_equals_single", outcome="failed", detail="5 of 8", value=0.625))
        writer.append(Check(cell=cell.id, name="golden_tokens", outcome="not_checked", detail="no golden | folder"))
        writer.finish()
    return writer.path


def test_gates_table_has_hashes_null_and_checks(usual, tmp_path) -> None:
    markdown = read(report.write([*usual[:2], verify_run(tmp_path)], tmp_path / "reports", csv=True), "report.md")
    section = markdown.partition("## Gates")[2].partition("\n## ")[0]
    assert "| same documents, same prompts | passed | documents, prompts and targets of" in section
    assert re.search(r"\| A/A null[^|]*\| (passed|\*\*FAILED\*\*) \|", section)
    assert "| finite logits | passed | all &lt;finite&gt; |" in section
    assert "| batch equals single | **FAILED** | 5 of 8 (value 0.625) |" in section
    assert "| golden tokens | not checked | no golden \\| folder |" in section
    assert "twotower-eval verify` does it" not in section
    assert "twotower-eval verify` does it" in read(usual[2], "report.md")


# --- publishing ----------------------------------------------------------------------------------------------------


def figures(markdown: str) -> str:
    """What a report says before it names the machine and the command lines."""
    return markdown.partition("## Environment")[0]


def test_publishing_copies_runs_and_report_and_says_what_it_changed(usual, tmp_path, capsys) -> None:
    run, _, _ = usual
    loaded = store.load(run)
    argv = ("/home/me/venv/bin/twotower-eval", "run", "--data-dir", "/home/me/data", "--plan=/root/p.toml")
    plan = {**loaded.manifest.plan, "data_dir": "/srv/data"}
    header = dataclasses.replace(loaded.manifest, argv=argv, plan=plan)
    rows = [*loaded.scores, *loaded.generations, *loaded.likelihoods]
    made.write(tmp_path / "results", header, rows)
    options = ["--results", str(tmp_path / "results"), "--out", str(tmp_path / "reports"), "--publish"]
    assert main(["report", *options]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("paths in its argv were made plain" in line for line in lines)
    assert any("still names '/srv/data' under plan.data_dir" in line for line in lines)
    folder = tmp_path / "results" / "published" / "pair_cpu_2026-11-01"
    copied = store.load(folder / made.RUN_ID)
    assert copied.complete
    assert copied.scores == loaded.scores
    assert copied.manifest.argv == ("twotower-eval", "run", "--data-dir", "~/data", "--plan=~/p.toml")
    assert copied.manifest.notes[-1] == "published: paths of the machine in argv were made plain"
    expected = {**to_json(header), "argv": list(copied.manifest.argv), "notes": list(copied.manifest.notes)}
    assert json.loads((folder / made.RUN_ID / "manifest.json").read_text()) == expected
    assert (tmp_path / "reports" / "published" / folder.name / "report.md").is_file()
    names = {file.name for file in (folder / made.RUN_ID).iterdir()}
    assert {"scores.jsonl.xz", "manifest.json", "done.json", "events.jsonl"} <= names
    assert "scores.jsonl" not in names
    again = report.write([folder / made.RUN_ID], tmp_path / "again")
    assert figures(read(again, "report.md")) == figures(
        read(tmp_path / "reports" / "published" / folder.name, "report.md")
    )
    with pytest.raises(ValueError, match="is packed, as published runs are"):
        store.resume(folder / made.RUN_ID, copied.manifest)
    packed = folder / made.RUN_ID / "scores.jsonl.xz"
    packed.write_bytes(packed.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"scores.jsonl.xz: cannot be unpacked .*: restore it"):
        store.load(folder / made.RUN_ID)
    assert main(["report", *options]) == 2
    assert "exists already and nothing published is overwritten" in capsys.readouterr().err


def test_what_is_unfinished_or_too_large_is_not_published(tmp_path, monkeypatch, usual) -> None:
    unfinished = store.load(made.quality_run(tmp_path / "a", complete=False, num_docs=10))
    places = {"results": tmp_path, "reports": tmp_path, "say": print}
    with pytest.raises(ValueError, match="is not complete: finish it"):
        report.publish([unfinished], usual[2], **places)
    monkeypatch.setattr("twotower_eval.analyse.report.publishing.MAX_BYTES", 1000)
    with pytest.raises(ValueError, match=r"the runs are \d\.\d MiB when packed, more than .* publish fewer runs"):
        report.publish([store.load(usual[0])], usual[2], **places)
    assert not (tmp_path / "published").exists()


def test_command_lines_are_made_plain() -> None:
    plain = plain_argv(["/x/bin/twotower-eval", "/Users/a b/m", "--homely", "rooted", "/rooted/x", "a=/root"])
    assert plain == ["twotower-eval", "~/m", "--homely", "rooted", "/rooted/x", "a=~"]
    assert plain_argv([]) == []


def test_an_unknown_format_is_refused(capsys) -> None:
    assert main(["report", "--format", "pdf"]) == 2
    assert "--format can be csv, model-card or lm-eval, not 'pdf'" in capsys.readouterr().err


# --- claims --------------------------------------------------------------------------------------------------------

CLAIMS = """
title = "The pair <b>of</b> the tests"

[[point]]
name = "named"
decoder = { kind = "block_diffusion", block_size = 16, steps_per_block = 16, threshold = 0.8, temperature = 0.0 }

[[claim]]
name = "kept"
quantity = "retention"
subject = "pair"
baseline = "context-tower"
point = "named"
scope = ["arithmetic", "sorting"]
expected = 0.5
source = "https://evil.example | <script>"

[[claim]]
name = "never"
quantity = "retention"
subject = "pair"
baseline = "context-tower"
point = "named"
scope = ["arithmetic", "sorting"]
expected = 1.5
source = "nobody"
"""


TWICE = """
title = "Twice as fast"

[[point]]
name = "named"
decoder = { kind = "block_diffusion", block_size = 16, steps_per_block = 16, threshold = 0.8, temperature = 0.0 }
batch_size = 1
num_devices = 1
workload = "answer"

[[claim]]
name = "twice"
quantity = "speedup_time"
subject = "pair"
baseline = "context-tower"
point = "named"
expected = 2.0
source = "nobody"
"""


def test_arms_of_equal_speed_refute_a_claim_and_no_line_contradicts_it(tmp_path) -> None:
    """The verdict was REFUTED, and the sentence, the row, the gate and the picture called the same timing INVALID."""
    plain = store.load(made.speed_run(tmp_path / "plain", num_rounds=30))
    cells = plain.cells
    total = {
        arm: sum(s.wall_s for s in plain.speed if cells[s.cell].arm == arm and not s.replica and s.phase == "measure")
        for arm in ("baseline", "candidate")
    }

    def level(row):
        slow = isinstance(row, SpeedSample) and row.prompts[0].num_denoiser_forwards
        return dataclasses.replace(row, wall_s=row.wall_s * total["baseline"] / total["candidate"]) if slow else row

    claims = tmp_path / "twice.toml"
    claims.write_text(TWICE, encoding="utf-8")
    runs = [made.quality_run(tmp_path), made.speed_run(tmp_path / "level", num_rounds=30, scored=True, edit=level)]
    markdown = read(report.write(runs, tmp_path, claims=str(claims)), "report.md")
    terms = "wall-clock speedup at least 2x (margin 5 %, so at least 1.9x)"
    assert f"**REFUTED in this launch**: claim twice, {terms} at 16/16/0.8" in markdown
    assert "at 1.00x [" in markdown
    assert "INVALID" not in markdown.partition("## Quality against speed")[0]
    assert "FAILED" not in markdown


def test_the_verdict_stands_first_and_every_claim_has_its_row(usual, tmp_path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text(CLAIMS, encoding="utf-8")
    folder = report.write(usual[:2], tmp_path, claims=str(file), html=True, csv=True)
    markdown = read(folder, "report.md")
    first = markdown.partition("## Verdict")[2].strip().splitlines()[0]
    terms = "retention at least 50 % (margin 0.5 points, so at least 49.5 %)"
    assert first.startswith(f"**SUPPORTED**: claim kept, {terms} at 16/16/0.8 (block/")
    kept = r"\| kept \| \*\*SUPPORTED\*\* \| [\d.]+ % \[[\d., ]+\] \| " + re.escape(terms) + r" \|"
    assert re.search(kept, markdown)
    assert re.search(r"\| never \| \*\*REFUTED\*\* \| [\d.]+ % \[", markdown)
    assert "&lt;b&gt;of&lt;/b&gt;" in markdown
    assert_harmless(read(folder, "report.html"))
    verdicts = frame(folder, "verdicts.csv").set_index("claim")
    assert dict(verdicts.outcome) == {"kept": "SUPPORTED", "never": "REFUTED"}
    assert verdicts.loc["kept", "runs"] == made.RUN_ID
    assert verdicts.loc["kept", "measured_level"] == 0.9


def test_without_a_claim_file_the_report_says_so(usual) -> None:
    assert "No claim file names a checkpoint of these runs" in read(usual[2], "report.md")


def test_commands_in_a_reason_are_code_and_the_rest_is_plain_text() -> None:
    assert with_commands("so *far*; `run --tasks a_b` measures it") == "so \\*far\\*; `run --tasks a_b` measures it"
    assert with_commands("a ` alone | here") == "a \\` alone \\| here"
