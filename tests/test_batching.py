"""Places of a batch are full on the shipped miniature; the bench that measures it runs."""

import json

import pytest
import torch

from twotower_eval import bench
from twotower_eval.bench import batching
from twotower_eval.models import load_model
from twotower_eval.models.counting import RowSteps, WatchedModel
from twotower_eval.plan import data_path


@pytest.mark.parametrize("kind", ["autoregressive", "block_diffusion"])
def test_at_eight_rows_most_row_steps_are_work(kind: str) -> None:
    """Unequal prompts with natural ends, the last rows of the call included. Every forward counts, extensions of the
    context too, which served a third of a batch while each finished block was absorbed by itself."""
    model = load_model(data_path("miniature", "pair"))
    prompts = batching.mixed_prompts(model, 80)
    assert len({len(prompt.token_ids) for prompt in prompts}) > 20
    way = next(way for way in batching.ways() if (way.kind, way.width) == (kind, 8))
    watched = WatchedModel(model)
    generations = batching.decode(watched, way, prompts)
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
    for i in range(0, 80, 16):
        [alone] = batching.decode(model, way_alone, prompts[i : i + 1])
        assert alone == generations[i]


def test_the_share_of_no_forwards_is_unknown() -> None:
    assert RowSteps().share(4) is None
    assert RowSteps([4, 2]).share(4) == 0.75


def test_the_bench_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "NUM_PROMPTS", 6)
    monkeypatch.setattr(batching, "MAX_NEW_TOKENS", 6)
    monkeypatch.setattr(batching, "WIDTHS", (1, 3))
    said: list[str] = []
    bench.run(["batching"], threads=torch.get_num_threads(), rounds=1, say=said.append)
    figures = json.loads(said[-1])["figures"]
    assert len(figures) == 8
    for name, found in figures.items():
        assert 0 < found["useful_share_of_steps"] <= 1
        assert found["num_tokens"] > 0
        assert f"| {name} " in said[1]
