"""Decoders that read parts behind caches: rows of a batch are single rows, and what is approximate says so."""

import copy
import os
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from twotower_eval.engine.decoders import decoder_spec, make_decoder
from twotower_eval.engine.decoders.commits import num_within_factor, threshold_or_quota
from twotower_eval.engine.families.llada2_moe import Settings, chosen_experts
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.protocol import Model
from twotower_eval.errors import UserError
from twotower_eval.measure.verify.replay import Noted
from twotower_eval.records import Prompt

GOLDEN = os.environ.get("TWOTOWER_EVAL_GOLDEN")
needs_models = pytest.mark.skipif(not GOLDEN, reason="needs the families' checkpoints (TWOTOWER_EVAL_GOLDEN)")
MASKS = {"fast_dllm_v1": 317, "fast_dllm_v2": 300, "llada2_moe": 303}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("fast_dllm_v1", "fast_dllm_v1", {"cache": "prefix", "block_length": 8, "threshold": 0.6}),
    ("fast_dllm_v1", "fast_dllm_v1", {"cache": "dual", "block_length": 8, "factor": 1.0}),
    ("fast_dllm_v1", "fast_dllm_v1", {"cache": "dual", "block_length": 8, "extra_step": True}),
    ("fast_dllm_v2", "fast_dllm_v2", {"threshold": 0.7}),
    ("fast_dllm_v2", "fast_dllm_v2", {"threshold": 0.7, "use_block_cache": True}),
    ("llada2_moe", "llada2", {"threshold": 0.6, "eos_early_stop": True}),
]


def _model(family: str) -> Model:
    model = load_model(Path(GOLDEN or "", "families", family))
    cast(Any, model).mask_token_id = MASKS[family]
    return model


def _prompts(lengths: tuple[int, ...]) -> list[Prompt]:
    draws = torch.Generator().manual_seed(7)
    rows = [torch.randint(0, 280, (length,), generator=draws).tolist() for length in lengths]
    return [Prompt(id=str(number), token_ids=tuple(row)) for number, row in enumerate(rows)]


@needs_models
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("family", "kind", "params"), CASES)
def test_rows_of_a_batch_are_single_rows(family: str, kind: str, params: dict[str, Any], temperature: float) -> None:
    decoder = make_decoder(_model(family), kind, **params, temperature=temperature)
    prompts = _prompts((5, 32, 13, 40, 33))
    ends = {"max_new_tokens": 24, "eos_token_ids": [111, 274, 104]}
    alone = [decoder.generate([prompt], **ends)[0] for prompt in prompts]  # type: ignore[arg-type]
    for width in (2, None):
        together = decoder.generate(prompts, max_batch_size=width, **ends)  # type: ignore[arg-type]
        assert [one.token_ids for one in together] == [one.token_ids for one in alone]
        counts = [(one.num_context_forwards, one.num_denoiser_forwards) for one in together]
        assert counts == [(one.num_context_forwards, one.num_denoiser_forwards) for one in alone]


@needs_models
def test_a_last_token_that_is_known_takes_no_pass() -> None:
    """A prompt of whole blocks and an answer of one token: the prefill predicts it."""
    noted = Noted(_model("fast_dllm_v2"))
    decoder = make_decoder(cast(Model, noted), "fast_dllm_v2")
    [made] = decoder.generate(_prompts((64,)), max_new_tokens=1)
    assert (noted.calls, made.num_tokens, made.num_denoiser_forwards) == ("P", 1, 0)


@needs_models
def test_decoders_refuse_models_that_they_do_not_fit() -> None:
    model = _model("llada2_moe")
    with pytest.raises(UserError, match="give --decoder sdar"):
        make_decoder(model, "fast_dllm_v2")
    canvas = copy.copy(_model("fast_dllm_v1"))
    with pytest.raises(UserError, match="reads blocks behind a cache"):
        make_decoder(canvas, "llada2").generate(_prompts((5,)), max_new_tokens=4)


def test_what_is_approximate_says_so() -> None:
    exact = [("fast_dllm_v1", {}), ("fast_dllm_v2", {}), ("llada2", {}), ("low_confidence", {})]
    rough = [("fast_dllm_v1", {"cache": "dual"}), ("fast_dllm_v2", {"use_block_cache": True})]
    assert not any("approximate" in decoder_spec(kind, **params).label for kind, params in exact)
    assert all("approximate" in decoder_spec(kind, **params).label for kind, params in rough)


def test_dllms_factor_counts_all_that_reach_their_limits() -> None:
    assert num_within_factor([0.5, 0.1, 0.76, 0.79], 1.0) == 2  # limits -1, 2/3, 3/4, 4/5


def test_a_threshold_counts_where_it_gives_the_quota() -> None:
    confidence_BK = torch.tensor([[0.9, 0.2, 0.8, 0.5], [0.9, 0.2, 0.8, 0.5]])
    eligible_BK = torch.tensor([[True, True, True, True], [False, True, True, True]])
    found = threshold_or_quota(confidence_BK, eligible_BK, 0.8, [1, 2])
    assert found.tolist() == [[True, False, False, False], [False, False, True, True]]


def test_experts_are_of_the_best_groups() -> None:
    """The best expert of all is left out, as its group's two best are worse together."""
    sizes = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"), 8)
    settings = Settings(
        **sizes,
        num_attention_heads=1,
        num_key_value_heads=1,
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=4,
        n_group=2,
        topk_group=1,
    )
    chosen = chosen_experts(torch.tensor([[0.9, 0.0, 0.0, 0.5, 0.6, 0.1]]), settings)
    assert sorted(chosen[0].tolist()) == [3, 4]
