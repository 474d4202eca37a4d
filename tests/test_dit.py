"""Diffusion transformers and their samplers, by the formulas of their papers, on networks made up here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import twotower_eval as tt
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.decoders.ancestral import analytic_weights, ancestral_weights
from twotower_eval.engine.decoders.sampled import race, without_mask
from twotower_eval.engine.families.dit import DiT, Sizes
from twotower_eval.engine.schedules import LogLinear
from twotower_eval.engine.scorers.bounds import LAST_TIME, mdlm_noised, spread, subs_logprobs
from twotower_eval.errors import FileError, UserError
from twotower_eval.records import Prompt

VOCAB, LENGTH = 23, 12


def random_tensors(sizes: Sizes) -> dict[str, torch.Tensor]:
    """Weights large enough that answers vary."""
    generator = torch.Generator().manual_seed(0)
    state = DiT(sizes).state_dict()
    drawn = {name: torch.randn(tensor.shape, generator=generator) * 0.3 for name, tensor in state.items()}
    return {**drawn, "rotary_emb.inv_freq": state["rotary_emb.inv_freq"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("mdlm")
    config: dict[str, Any] = {"model_type": "mdlm", "vocab_size": VOCAB, "hidden_dim": 16, "n_blocks": 2, "n_heads": 2}
    config |= {"cond_dim": 8, "model_length": LENGTH}
    (made / "config.json").write_text(json.dumps(config))
    sizes = Sizes(vocab_size=VOCAB, hidden_size=16, num_blocks=2, num_heads=2, condition=8)
    save_file(
        {f"backbone.{name}": tensor for name, tensor in random_tensors(sizes).items()}, made / "model.safetensors"
    )
    return made


PROMPTS = [Prompt(id=str(n), token_ids=tuple(range(1, 1 + n)), seed=n) for n in (3, 1, 0, 5)]


@pytest.mark.parametrize(
    "params",
    [
        {"predictor": "ddpm"},
        {"predictor": "ddpm_cache"},
        {"predictor": "analytic"},
        {"stride": 3},
        {"whole_batch": True},
    ],
)
def test_rows_of_a_batch_are_as_alone(folder: Path, params: dict[str, Any]) -> None:
    model = tt.load_model(folder)
    decoder = make_decoder(model, "ancestral", steps=6, **params)
    together = decoder.generate(PROMPTS, max_new_tokens=16 if "stride" in params else 7)
    alone = [decoder.generate([prompt], max_new_tokens=16 if "stride" in params else 7)[0] for prompt in PROMPTS]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert all(model.mask_token_id not in one.token_ids for one in together)
    assert len({one.token_ids for one in together}) > 1


def test_what_a_sampler_keeps_changes_no_canvas(folder: Path) -> None:
    """Steps without a mask, and logits of a batch whose other rows have changed."""
    model = tt.load_model(folder)
    made = [
        make_decoder(model, "ancestral", steps=9, **params).generate(PROMPTS, max_new_tokens=7)
        for params in ({}, {"all_steps": True}, {"whole_batch": True, "all_steps": True})
    ]
    assert made[0] != made[1]
    assert len({tuple(one.token_ids for one in run) for run in made}) == 1
    forwards = [sum(one.num_denoiser_forwards for one in run) for run in made]
    assert forwards[0] <= forwards[1] <= forwards[2] <= 10 * len(PROMPTS)
    assert all(one.num_context_forwards == 0 for one in made[0])


def test_ancestral_steps_by_the_formula() -> None:
    """ddpm follows the schedule, ddpm_cache masks with probability t; a time below 0 leaves no mask."""
    probability = without_mask(torch.tensor([[1.0, 2.0, 0.5, 9.0]]), 3)
    assert probability[0, 3] == 0
    assert probability.sum() == pytest.approx(1)
    t, s = torch.tensor(0.5), torch.tensor(0.4)
    assert float(LogLinear().masked(t)) == pytest.approx(0.999 * 0.5)
    weight = ancestral_weights(probability, 3, t, s)
    assert weight[0, :3] == pytest.approx(probability[0, :3] * 0.1, abs=1e-7)
    assert weight[0, 3] == pytest.approx(0.4)
    never = ancestral_weights(probability, 3, torch.tensor(0.0), torch.tensor(-0.1))
    assert int(race(never, torch.tensor([[0.5, 0.5, 0.5, 1 - 1e-7]]))) < 3


def test_an_analytic_step_is_the_reverse_of_the_noise() -> None:
    """Its weights are those of an ancestral step, up to a factor."""
    probability = without_mask(torch.tensor([[1.0, 2.0, 0.5, 9.0]]), 3)
    t, s = torch.tensor(0.6), torch.tensor(0.35)
    schedule = LogLinear()
    expected = ancestral_weights(probability.clone(), 3, schedule.masked(t), schedule.masked(s))
    found = analytic_weights(probability, 3, t, s)
    assert (found / found.sum())[0].tolist() == pytest.approx((expected / expected.sum())[0].tolist(), abs=1e-6)
    assert analytic_weights(probability, 3, t, None)[0, 3] == 0


def test_draws_of_zero_are_no_infinity() -> None:
    assert float(1e-10 - torch.log(torch.tensor(0.0) + 1e-10)) == pytest.approx(23.03, abs=0.01)
    assert race(torch.tensor([[0.4, 0.6]]), torch.tensor([[0.0, 0.0]])).tolist() == [1]


def test_mdlms_parameterisation_and_times() -> None:
    logits, ids = torch.randn(1, 2, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([[3, 1]])
    found = subs_logprobs(logits, ids, 3)
    assert found[0, 1].tolist() == [-1e6, 0.0, -1e6, -1e6]
    assert found[0, 0, :3].exp().sum() == pytest.approx(1)
    assert spread(torch.tensor([0.5, 0.5])).tolist() == [0.25, 0.75]
    noised = mdlm_noised(torch.tensor([0.999999]), num_steps=4)
    assert float(noised.weight) == pytest.approx(1 / LAST_TIME)
    assert float(noised.masked) == pytest.approx(0.999)
    even = mdlm_noised(torch.tensor([0.3]), change_of_variables=True)
    assert float(even.weight) == pytest.approx(float(-torch.log1p(-torch.exp(torch.tensor(-1e-3)))), rel=1e-4)


def test_what_is_wrong_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="stride goes with predictor ddpm_cache"):
        make_decoder(tt.load_model(folder), "ancestral", predictor="analytic", stride=2)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_blocks": 1}))
    with pytest.raises(FileError, match="has unexpected tensor blocks"):
        tt.load_model(tmp_path)
