"""Tokens per forward in three ways, and accuracy under parallelism, against figures worked by hand."""

import csv
import dataclasses
import io
from math import exp
from pathlib import Path

import pytest
from report_fixture import block_diffusion, quality_run

from twotower_eval import store
from twotower_eval.analyse import report
from twotower_eval.analyse.compare.figures import count
from twotower_eval.analyse.compare.runs import Runs
from twotower_eval.analyse.compare.tradeoff import accuracy_under_parallelism, curves, kept
from twotower_eval.records import Generation

ANSWER = Generation(
    prompt_id="t/0",
    token_ids=tuple(range(128)),
    text="x",
    finish="length",
    num_prompt_tokens=10,
    num_tokens=128,
    num_discarded_tokens=0,
    num_context_forwards=8,
    num_denoiser_forwards=72,
)


def test_tokens_per_forward_are_given_three_ways() -> None:
    """128 tokens in 8 blocks with 72 passes: 72 denoiser and 8 context forwards, of which the first is the prefill."""
    once = count([ANSWER])
    assert once.tokens_per_nfe == pytest.approx(128 / 72)
    assert once.tokens_per_nfe_and_commit == pytest.approx(128 / (72 + 7))
    assert once.tokens_per_forward == pytest.approx(128 / 80)
    short = dataclasses.replace(
        ANSWER, num_tokens=8, token_ids=tuple(range(8)), num_context_forwards=1, num_denoiser_forwards=4
    )
    both = count([ANSWER, short])  # sums over sums
    assert both.tokens_per_nfe == pytest.approx(136 / 76)
    assert both.tokens_per_nfe_and_commit == pytest.approx(136 / (76 + 7))
    assert both.tokens_per_forward == pytest.approx(136 / 85)


def test_an_autoregressive_decoder_has_no_denoiser_to_count() -> None:
    alone = count([dataclasses.replace(ANSWER, num_context_forwards=128, num_denoiser_forwards=0)])
    assert (alone.tokens_per_nfe, alone.tokens_per_nfe_and_commit) == (None, None)
    assert alone.tokens_per_forward == 1.0


def test_a_decoder_without_a_prefill_has_none_taken_off() -> None:
    whole = count([dataclasses.replace(ANSWER, num_context_forwards=0)])
    assert whole.tokens_per_nfe == whole.tokens_per_nfe_and_commit == whole.tokens_per_forward


def test_aup_by_hand() -> None:
    """80 % at 1 token per forward and 78 % at 2; 70 % at 4 lies more than 5 points below 80 % and is left out."""
    points = [(4.0, 70.0), (1.0, 80.0), (2.0, 78.0)]
    assert kept(points) == [(1.0, 80.0), (2.0, 78.0)]
    # y_max is 80: W(80) = 1, W(78) = exp(-3 * 0.025) = 0.927743.
    assert accuracy_under_parallelism(points, 80.0) == pytest.approx(80 + (78 * 0.927743 + 80) / 2, abs=1e-4)
    # y_max is 90: W(80) = exp(-1/3) = 0.716531, W(78) = exp(-0.4) = 0.670320; the first term has no weight.
    assert accuracy_under_parallelism(points, 90.0) == pytest.approx(80 + (52.28496 + 57.32250) / 2, abs=1e-3)
    assert accuracy_under_parallelism([(2.5, 40.0)], 80.0) == 100.0
    with pytest.raises(ValueError, match="no point"):
        accuracy_under_parallelism([], 80.0)
    with pytest.raises(ValueError, match="no accuracy is above 0"):
        accuracy_under_parallelism([(1.0, 0.0)], 0.0)


def test_curves_are_of_one_decoder_swept_by_threshold_and_steps(tmp_path: Path) -> None:
    decoders = [block_diffusion(16, None, 0.8), block_diffusion(16, None, 0.9), block_diffusion(8, None, 0.9)]
    run = store.load(quality_run(tmp_path, decoders=decoders, tasks=("arithmetic", "choice"), perplexity=False))
    runs = Runs([run])
    [curve] = curves(runs, runs.quality)  # a point alone is no curve, and options are not written by the decoder
    assert (curve.task, curve.metric, len(curve.points)) == ("arithmetic", "exact_match", 2)
    low, high = curve.points
    assert (low.candidate.decoder.params["threshold"], high.candidate.decoder.params["threshold"]) == (0.9, 0.8)
    scores = {(s.cell, s.doc_id): s.value for s in run.scores if s.task == "arithmetic" and s.value is not None}
    accuracy = {cell: 100 * sum(v for (c, _), v in scores.items() if c == cell) / 150 for cell, _ in scores}
    assert curve.best == pytest.approx(max(accuracy.values()))
    rows = [[r.generation for r in run.generations if r.cell == p.candidate.id] for p in (low, high)]
    rates = [sum(g.num_tokens for g in own) / sum(g.num_denoiser_forwards for g in own) for own in rows]
    ys = [accuracy[p.candidate.id] for p in (low, high)]
    weighted = [y * min(1, exp(-3 * (1 - y / curve.best))) for y in ys]
    assert curve.aup == pytest.approx(rates[0] * ys[0] + (rates[1] - rates[0]) * sum(weighted) / 2)
    assert curve.aup_with_commits is not None
    assert curve.aup_with_all is not None
    assert curve.aup > curve.aup_with_commits > curve.aup_with_all


def test_reports_and_tables_have_them(tmp_path: Path) -> None:
    decoders = [block_diffusion(16, None, 0.8), block_diffusion(16, None, 0.9)]
    path = quality_run(tmp_path, decoders=decoders, tasks=("arithmetic",), perplexity=False)
    folder = report.write([path], tmp_path / "out", csv=True)
    markdown = (folder / "report.md").read_text(encoding="utf-8")
    assert "| AUP by NFE | with commits | with prefill and all else |" in markdown
    tables = {name: list(csv.DictReader(io.StringIO((folder / "tables" / name).read_text()))) for name in FILES}
    curve, forwards = tables["aup.csv"][0], tables["forwards.csv"][0]
    assert float(curve["aup_by_nfe"]) > float(curve["aup_by_nfe_and_commit"]) > float(curve["aup_by_all_forwards"]) > 0
    assert float(forwards["candidate_tokens_per_nfe"]) > float(forwards["candidate_tokens_per_forward"])
    assert (forwards["baseline_tokens_per_nfe"], forwards["baseline_tokens_per_nfe_and_commit"]) == ("", "")


FILES = ("aup.csv", "forwards.csv")
