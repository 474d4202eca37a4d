"""What a model lacks is said in one line where it is needed, before anything runs."""

from __future__ import annotations

import pytest
from tiny_models import tiny_pair

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models.arms import context_tower
from twotower_eval.engine.models.graphs import stepped
from twotower_eval.engine.models.protocol import Model, as_model, branching, has_denoiser, text_codec, two_tower
from twotower_eval.engine.scorers import make_scorer
from twotower_eval.errors import UserError
from twotower_eval.records import Checkpoint


@pytest.fixture
def pair() -> Model:
    """A pair without a tokenizer."""
    model = as_model(tiny_pair())
    model.checkpoint = Checkpoint(
        name="tiny", family="nemotron_h", source="here", digest="0" * 64, dtype="float32", devices=("cpu",)
    )
    model.context_digest = "1" * 64
    return model


def test_a_tower_alone_has_no_denoiser_to_narrow_to(pair: Model) -> None:
    assert two_tower(pair, "none") is pair
    tower = context_tower(pair)
    assert not has_denoiser(tower)
    with pytest.raises(UserError, match=r"^a denoiser is needed$"):
        two_tower(tower, "a denoiser is needed")
    with pytest.raises(UserError, match=r"^decoder 'block_diffusion' needs a two-tower checkpoint.*autoregressive$"):
        make_decoder(tower, "block_diffusion")
    with pytest.raises(UserError, match=r"^decoder 'mock_ar' needs a two-tower checkpoint.*autoregressive$"):
        make_decoder(tower, "reference", mode="mock_ar")
    with pytest.raises(UserError, match=r"^likelihood 'bound' needs a denoiser, and tiny has none$"):
        make_scorer(tower, "bound")


def test_a_model_without_tokenizer_files_says_so_where_text_is_read(pair: Model) -> None:
    with pytest.raises(UserError, match=r"^checkpoint tiny has no tokenizer files"):
        text_codec(pair)


def test_powers_that_a_family_lacks_are_none_or_one_line(pair: Model) -> None:
    assert branching(pair) is pair
    assert stepped(pair) is pair
    plain = PlainFamily(pair)
    assert branching(plain) is None
    with pytest.raises(UserError, match=r"^checkpoint tiny is of family nemotron_h, whose steps cannot come from CUDA"):
        stepped(plain)


class PlainFamily:
    """An outsider's model that has what every model has, and nothing more."""

    def __init__(self, model: Model) -> None:
        for name in ("checkpoint", "tokenizer", "vocab_size", "max_length", "eos_token_ids", "mask_token_id"):
            setattr(self, name, getattr(model, name, None))
        self.has_denoiser, self.joins_contexts = False, False
