"""RADD: its samplers and bounds by their formulas, on a network made up here."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import twotower_eval as tt
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.decoders.radd import rates, step_weights
from twotower_eval.engine.families.dit import DiT, Sizes
from twotower_eval.engine.models import family_of
from twotower_eval.engine.scorers import bounds
from twotower_eval.errors import UserError
from twotower_eval.records import Prompt

VOCAB, LENGTH = 23, 12
PROMPTS = [Prompt(id=str(n), token_ids=tuple(range(1, 1 + n)), seed=n) for n in (3, 1, 0, 5)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("radd")
    sizes = Sizes(vocab_size=VOCAB, hidden_size=16, num_blocks=2, num_heads=2, condition=None)
    inner = {"hidden_size": 16, "n_blocks": 2, "n_heads": 2, "length": LENGTH, "cond_dim": 8}
    config = {"tokens": VOCAB - 1, "model": inner, "noise": {"type": "loglinear"}, "training": {}}
    (made / "config.json").write_text(json.dumps(config))
    generator, state = torch.Generator().manual_seed(0), DiT(sizes).state_dict()
    drawn = {name: torch.randn(tensor.shape, generator=generator) * 0.5 for name, tensor in state.items()}
    save_file({**drawn, "rotary_emb.inv_freq": state["rotary_emb.inv_freq"]}, made / "model.safetensors")
    return made


@pytest.mark.parametrize(
    "params", [{}, {"method": "euler"}, {"top_p": 0.8}, {"top_k": 4}, {"method": "ordered"}, {"half": True}]
)
def test_rows_of_a_batch_are_as_alone(folder: Path, params: dict[str, Any]) -> None:
    model = tt.load_model(folder)
    assert family_of(folder) == model.checkpoint.family == "radd"
    decoder = make_decoder(model, "radd", **params)
    together = decoder.generate(PROMPTS, max_new_tokens=7)
    assert [one.token_ids for one in together] == [
        decoder.generate([prompt], max_new_tokens=7)[0].token_ids for prompt in PROMPTS
    ]
    assert all(VOCAB - 1 not in one.token_ids for one in together)
    assert all(one.num_denoiser_forwards <= 7 for one in together)


def test_the_rates_of_both_methods() -> None:
    """Tweedie's is the exact share of masks that go in a step, Euler's its first order in the step."""
    t, dt, eps = torch.tensor(1.0), (1 - 1e-5) / 4, 1e-3
    masked = [(1 - eps) * float(t), (1 - eps) * (float(t) - dt)]
    assert float(rates(4, 1e-5, euler=False)[0]) == pytest.approx(1 - masked[1] / masked[0], rel=1e-5)
    assert float(rates(4, 1e-5, euler=True)[0]) == pytest.approx(dt * (1 - eps) / masked[0], rel=1e-4)


def test_weights_of_a_step() -> None:
    probability = torch.tensor([[0.25, 0.75, 0.0]])
    assert step_weights(probability, 2, torch.tensor(1.001), half=False)[0, 2] < 0
    tiny = torch.tensor([[1e-8, 1.0, 0.0]])
    assert step_weights(tiny, 2, torch.tensor(0.5), half=True)[0].tolist() == [0.0, 0.5, 0.5]
    assert step_weights(tiny, 2, torch.tensor(0.5), half=False)[0, 0] > 0


def test_both_bounds_over_time_are_one() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB - 1, (3, LENGTH), generator=generator)
    logprob = bounds.unmasked_logprobs(torch.randn(3, LENGTH, VOCAB, generator=generator), VOCAB - 1)
    own = logprob.gather(-1, ids[..., None])[..., 0]
    noised = bounds.radd_noised(torch.tensor([0.4]), 3)
    masked = torch.rand(3, LENGTH, generator=generator) < noised.masked[:, None]
    entropy = bounds.score_entropy_bound(logprob, ids, masked, noised)
    plain = bounds.cross_entropy_bound(own, masked, noised, as_published=False)
    assert torch.allclose(entropy, plain, rtol=1e-4)
    assert not torch.allclose(bounds.cross_entropy_bound(own, masked, noised, as_published=True), plain, rtol=1e-2)


def test_filling_in_order_is_exact() -> None:
    """The log-likelihoods of all rows of two tokens sum to one, in either order."""
    table = torch.randn(4, 4, 2, 4, generator=torch.Generator().manual_seed(0))
    ids = torch.cartesian_prod(torch.arange(3), torch.arange(3))

    def logprobs(noisy: torch.Tensor) -> torch.Tensor:
        return bounds.unmasked_logprobs(table[noisy[:, 0], noisy[:, 1]], 3)

    for order in ((0, 1), (1, 0)):
        assert float(bounds.in_order(logprobs, ids, order, 3).exp().sum()) == pytest.approx(1, abs=1e-5)


def test_what_does_not_go_together_is_said(folder: Path) -> None:
    with pytest.raises(UserError, match="top_p and top_k are two ways"):
        make_decoder(tt.load_model(folder), "radd", top_p=0.5, top_k=2)
