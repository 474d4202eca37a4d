"""BD3-LM: its cache and sampler by what must hold of them, on a network whose answers vary."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import twotower_eval as tt
from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.decoders.bd3lm import nucleus
from twotower_eval.engine.families.bd3lm import uncached
from twotower_eval.engine.families.dit import DiT, Sizes
from twotower_eval.records import Prompt

VOCAB, SIZE = 23, 4
PROMPTS = [Prompt(id=str(n), token_ids=tuple(range(1, 1 + n)), seed=n) for n in (3, 1, 8, 5)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder: Path = tmp_path_factory.mktemp("bd3lm")
    config: dict[str, Any] = {"model_type": "bd3lm", "vocab_size": VOCAB, "hidden_dim": 16, "n_blocks": 2, "n_heads": 2}
    config |= {"cond_dim": 8, "model_length": 16, "block_size": SIZE}
    (folder / "config.json").write_text(json.dumps(config))
    sizes = Sizes(vocab_size=VOCAB, hidden_size=16, num_blocks=2, num_heads=2, condition=8)
    generator, state = torch.Generator().manual_seed(0), DiT(sizes).state_dict()
    drawn = {name: torch.randn(tensor.shape, generator=generator) * 0.4 for name, tensor in state.items()}
    for name in drawn:  # what the tokens are counts more than the noise level, which is the same everywhere
        drawn[name] *= 0.01 if "adaLN" in name or "linear.bias" in name else 1.0
        drawn[name] = torch.ones_like(drawn[name]) if "norm" in name else drawn[name]
    drawn["rotary_emb.inv_freq"] = state["rotary_emb.inv_freq"]
    save_file({f"backbone.{name}": tensor for name, tensor in drawn.items()}, folder / "model.safetensors")
    return tt.load_model(folder)


@torch.inference_mode()
def test_the_cache_is_exact_within_a_window(model: Any) -> None:
    ids = torch.randint(0, VOCAB, (2, 16), generator=torch.Generator().manual_seed(1))
    plain = model.plain_logits(ids)
    assert len(set(plain.argmax(-1).flatten().tolist())) > 5
    context = model.prefill(ids[:, :SIZE])
    for start in range(SIZE, 16, SIZE):
        block = ids[:, start : start + SIZE]
        assert torch.allclose(model.denoise(block, context), plain[:, start : start + SIZE], atol=5e-5)
        context = model.extend(context, block)
    uneven = model.prefill(ids, [8, 4])
    assert torch.allclose(model.denoise(ids[:1, 8:12], uneven.select([0])), plain[:1, 8:12], atol=5e-5)
    assert torch.allclose(model.denoise(ids[1:, 4:8], uneven.select([1])), plain[1:, 4:8], atol=5e-5)


@torch.inference_mode()
def test_a_window_moves_on_by_blocks(model: Any) -> None:
    """The first layer of what is left is as if nothing had been before; deeper ones remember it."""
    ids = torch.randint(0, VOCAB, (1, 20), generator=torch.Generator().manual_seed(2))
    kept = model.denoise(ids[:, 16:], model.prefill(ids[:, :16]))
    anew = uncached(model).denoise(ids[:, 16:], uncached(model).prefill(ids[:, :16]))
    assert torch.allclose(anew, model.plain_logits(ids[:, 4:])[:, 12:], atol=5e-5)
    assert not torch.allclose(kept, anew, atol=1e-2)


@pytest.mark.parametrize("params", [{}, {"first_hitting": False, "steps": 3}, {"top_p": 0.7}])
def test_rows_of_a_batch_are_as_alone(model: Any, params: dict[str, Any]) -> None:
    decoder = make_decoder(model, "bd3lm", **params)
    together = decoder.generate(PROMPTS, max_new_tokens=18)
    alone = [decoder.generate([prompt], max_new_tokens=18)[0] for prompt in PROMPTS]
    assert [one.token_ids for one in together] == [one.token_ids for one in alone]
    assert all(VOCAB - 1 not in one.token_ids for one in together)
    assert [one.num_context_forwards for one in together] == [one.num_context_forwards for one in alone]
    if not params:
        assert [one.num_denoiser_forwards for one in alone] == [21, 19, 20, 19]


def test_the_nucleus_with_and_without_the_token_that_crosses() -> None:
    probability = torch.tensor([0.5, 0.3, 0.2])
    assert nucleus(probability, 0.6, drop_crossing=True).tolist() == [1.0, 0.0, 0.0]
    assert nucleus(probability, 0.6, drop_crossing=False).tolist() == pytest.approx([0.625, 0.375, 0.0])
    assert nucleus(probability, 0.1, drop_crossing=True).tolist() == [1.0, 0.0, 0.0]
