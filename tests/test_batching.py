"""Places of a batch are full on the shipped miniature; the bench that measures it runs."""

import json
from pathlib import Path

import bench
import pytest
import torch
from bench import batching
from bench.__main__ import main
from bench.memory import measure
from bench.subject import random_pair, write_tower

from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.counting import RowSteps, WatchedModel
from twotower_eval.resources import data_path

NUM_PROMPTS, MAX_NEW_TOKENS = batching.FULL


@pytest.mark.parametrize("kind", ["autoregressive", "block_diffusion"])
def test_at_eight_rows_most_row_steps_are_work(kind: str) -> None:
    """Unequal prompts with natural ends, the last rows of the call included. Every forward counts, extensions of the
    context too, which served a third of a batch while each finished block was absorbed by itself."""
    model = load_model(data_path("miniature", "pair"))
    prompts = batching.mixed_prompts(model, NUM_PROMPTS)
    assert len({len(prompt.token_ids) for prompt in prompts}) > 20
    way = next(way for way in batching.ways() if (way.kind, way.width) == (kind, 8))
    watched = WatchedModel(model)
    generations = batching.decode(watched, way, prompts, MAX_NEW_TOKENS)
    steps = RowSteps(watched.denoisings.rows + watched.extensions.rows)
    share = steps.share(8)
    assert share is not None
    assert share >= 0.85
    # What was served is what the generations counted: no row is carried along for nothing.
    num_prefilled = sum(watched.prefills.rows)
    assert num_prefilled == len(prompts)
    counted = sum(g.num_denoiser_forwards + g.num_context_forwards for g in generations)
    assert sum(steps.rows) + num_prefilled == counted
    way_alone = next(way for way in batching.ways() if (way.kind, way.width) == (kind, 1))
    for i in range(0, NUM_PROMPTS, 16):
        [alone] = batching.decode(model, way_alone, prompts[i : i + 1], MAX_NEW_TOKENS)
        assert alone == generations[i]


def test_the_share_of_no_forwards_is_unknown() -> None:
    assert RowSteps().share(4) is None
    assert RowSteps([4, 2]).share(4) == 0.75


def test_the_bench_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "SMALL", (6, 6))
    monkeypatch.setattr(batching, "WIDTHS", (1, 3))
    said: list[str] = []
    bench.run(["batching"], threads=torch.get_num_threads(), rounds=1, say=said.append)
    figures = json.loads(said[-1])["figures"]
    assert len(figures) == 8
    for name, found in figures.items():
        assert 0 < found["useful_share_of_steps"] <= 1
        assert found["num_tokens"] > 0
        assert f"| {name} " in said[1]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["engin"], "did you mean 'engine'?"),
        (["engine", "--rounds", "0"], "rounds must be 1 or more"),
        (["engine", "--limit", "3"], "--limit would be ignored"),
        (["scoring"], "bench scoring needs --model and --data-dir"),
        (["scoring", "--model", "m", "--data-dir", "nowhere"], "nowhere has neither hellaswag nor"),
    ],
)
def test_what_the_benches_cannot_use_is_one_line(
    argv: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_memory_is_measured_in_a_process_that_finds_the_benches(tmp_path: Path) -> None:
    write_tower(tmp_path, random_pair(), "context_tower")
    rise_bytes = measure("ours", tmp_path, 64)
    assert rise_bytes is None or rise_bytes >= 0
