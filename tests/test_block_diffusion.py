"""Block diffusion on a scripted denoiser, where every count and every commit is known beforehand; specifications."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import Pieces, Scripted, tiny_pair
from torch import Tensor

from twotower_eval.engine.decoders import DECODERS, decoder_spec, from_spec, make_decoder
from twotower_eval.engine.decoders.rows import cut, is_finished, make_rules, packed, unpacked
from twotower_eval.records import Generation, Prompt

PROMPT = Prompt(id="p", token_ids=(1, 2))
MASK, VOCAB = Scripted.mask_token_id, Scripted.vocab_size


def logits_for(tokens: Sequence[int], confidences: Sequence[float]) -> Tensor:
    """(K, V) logits that give each token its confidence; the mask token, to be excluded, has the highest of all."""
    logits = torch.empty(len(tokens), VOCAB)
    for row, token, p in zip(logits, tokens, confidences, strict=True):
        row.fill_(math.log((1 - p) / (VOCAB - 2)) if p < 1 else -torch.inf)
        row[token] = math.log(p)
        row[MASK] = 30.0
    return logits


def run(
    script: Callable[[int, int], Tensor], max_new_tokens: int, eos: Sequence[int] = (), **params: Any
) -> tuple[Generation, Scripted]:
    """The generation for one prompt, traced, and the model that was called."""
    model = Scripted(script)
    decoder = make_decoder(model, "block_diffusion", trace=True, **params)
    [g] = decoder.generate([PROMPT], max_new_tokens=max_new_tokens, eos_token_ids=eos)
    return g, model


def constant(tokens: Sequence[int], confidences: Sequence[float]) -> Callable[[int, int], Tensor]:
    return lambda block, step: logits_for(tokens, confidences)


def positions(g: Generation) -> list[tuple[int, ...]]:
    assert g.trace is not None
    return [step.positions for step in g.trace]


def test_forwards_of_the_protocols_example() -> None:
    """128 tokens in 8 blocks of 9 passes each: 72 denoiser and 8 context forwards, no extension behind the last."""

    def script(block: int, step: int) -> Tensor:
        sure = [0.9 if i == step or step >= 8 else 0.5 for i in range(16)]
        return logits_for([i % 7 for i in range(16)], sure)

    g, model = run(script, 128, block_size=16, threshold=0.8)
    assert (g.num_denoiser_forwards, g.num_context_forwards, g.num_tokens) == (72, 8, 128)
    assert (model.calls.count("denoise"), model.calls.count("extend"), model.calls.count("prefill")) == (72, 7, 1)
    assert model.calls[-1] == "denoise"
    assert g.num_forced_commits == 0


def test_a_budget_that_is_no_multiple_of_the_block() -> None:
    g, model = run(constant([1, 2, 3, 4], [0.9] * 4), 6, block_size=4)
    assert (g.token_ids, g.finish) == ((1, 2, 3, 4, 1, 2), "length")
    assert (g.num_discarded_tokens, g.num_denoiser_forwards, g.num_context_forwards) == (2, 2, 2)
    assert model.calls == ["prefill", "denoise", "extend", "denoise"]


def test_eos_in_the_middle_of_a_block() -> None:
    """Nothing from EOS on counts, and no further block is made."""
    g, model = run(constant([1, 5, 6, 5], [0.9] * 4), 40, eos=(5, 8), block_size=4)
    assert (g.token_ids, g.finish, g.num_tokens, g.num_discarded_tokens) == ((1,), "eos", 1, 3)
    assert model.calls == ["prefill", "denoise"]


def test_eos_behind_the_budget_is_not_seen() -> None:
    g, _ = run(constant([1, 2, 5, 6], [0.9] * 4), 2, eos=(5,), block_size=4)
    assert (g.token_ids, g.finish, g.num_discarded_tokens) == ((1, 2), "length", 2)


def test_of_equal_confidences_the_higher_positions_go_first() -> None:
    g, _ = run(constant([1, 2, 3, 4, 6], [0.5] * 5), 5, block_size=5, steps_per_block=3, threshold=0.8)
    assert positions(g) == [(3, 4), (1, 2), (0,)]
    assert g.num_forced_commits == 5


def test_above_the_threshold_is_strict() -> None:
    """A threshold of 1.0 is never exceeded, not even by probabilities of exactly 1."""
    certain = constant([1, 2, 3, 4], [1.0] * 4)
    g, _ = run(certain, 4, block_size=4, threshold=1.0)
    assert positions(g) == [(3,), (2,), (1,), (0,)]
    assert g.num_forced_commits == 4
    assert all(step.confidences == (1.0,) for step in g.trace or ())
    g, _ = run(certain, 4, block_size=4, threshold=0.9999)
    assert positions(g) == [(0, 1, 2, 3)]
    assert g.num_forced_commits == 0


def test_the_floor_spreads_what_is_left_over_the_steps_left() -> None:
    """5 masked, 3 steps: ceil(5/3) = 2; of these one was above the threshold, the other forced."""
    g, _ = run(constant([1, 2, 3, 4, 6], [0.9, 0.1, 0.2, 0.3, 0.4]), 5, block_size=5, steps_per_block=3, threshold=0.8)
    assert positions(g) == [(0, 4), (2, 3), (1,)]
    assert [step.num_forced for step in g.trace or ()] == [1, 2, 1]


def test_committed_tokens_never_change() -> None:
    def script(block: int, step: int) -> Tensor:
        return logits_for([step] * 4, [0.9 if i == step else 0.3 for i in range(4)])

    g, _ = run(script, 4, block_size=4, threshold=0.8)
    assert g.token_ids == (0, 1, 2, 3)
    assert [(s.block, s.step, s.token_ids) for s in g.trace or ()] == [(0, i, (i,)) for i in range(4)]


def test_more_steps_than_positions() -> None:
    g, _ = run(constant([1, 2, 3], [0.5] * 3), 3, block_size=3, steps_per_block=50, threshold=0.8)
    assert g.num_denoiser_forwards == 3


def test_confidence_of_a_sample_is_its_probability_at_temperature_1() -> None:
    g, _ = run(constant([1, 2, 3, 4], [0.6] * 4), 4, block_size=4, threshold=0.5, temperature=5.0)
    others = 0.4 / (VOCAB - 2)
    for step in g.trace or ():
        for position, token, confidence in zip(step.positions, step.token_ids, step.confidences, strict=True):
            likeliest = token == (1, 2, 3, 4)[position]
            assert confidence == pytest.approx(0.6 if likeliest else others, rel=1e-4)
            assert token != MASK


def test_no_trace_and_no_times_unless_asked_for() -> None:
    model = tiny_pair()
    [g] = make_decoder(model, "block_diffusion").generate([PROMPT], max_new_tokens=3)
    assert (g.trace, g.finish_s, g.text) == (None, None, None)


# These need more than a two-tower model here, or another one.
OTHERS = {"draft", "endpoint", "bd3lm", "e2d2", "entropy_bound", "fast_dllm_v2", "llada2", "sdar", "static_cache"}


@pytest.mark.parametrize("kind", sorted({*DECODERS} - OTHERS))
def test_finish_times_come_from_the_clock(kind: str) -> None:
    """Seconds since generate began; rows that finish later have later times."""
    ticks = iter(range(100, 10_000))
    decoder = make_decoder(tiny_pair(), kind, clock=lambda: float(next(ticks)))
    [free] = make_decoder(tiny_pair(), kind).generate([PROMPT], max_new_tokens=40)
    first_new = Prompt(id="q", token_ids=(7,))
    generations = decoder.generate([PROMPT, first_new], max_new_tokens=40, eos_token_ids=free.token_ids[:1])
    assert all(g.finish_s is not None and g.finish_s > 0 for g in generations)
    assert generations[0].num_tokens == 0


def test_stop_strings_across_borders_by_hand() -> None:
    """A token straddling the stop is not useful, but its text before the stop is kept."""
    model = Scripted(lambda block, step: logits_for([(1, 2), (3, 4), (5, 6)][block % 3], [0.9, 0.9]))
    model.tokenizer = Pieces(["", "on", "e st", "op", "st", "x", "y", "", "", ""])
    decoder = make_decoder(model, "block_diffusion", block_size=2)
    [g] = decoder.generate([PROMPT], max_new_tokens=12, stop=["nothing", "stop"])
    assert (g.token_ids, g.text, g.finish) == ((1,), "one ", "stop")
    assert (g.num_discarded_tokens, g.num_denoiser_forwards) == (3, 2)


def test_the_end_of_a_text_alone_never_stops_a_row() -> None:
    """Decoders of some tokenizers read the first token of a text differently; the cut, on the whole text, decides."""

    class Capital(Pieces):
        def decode(self, token_ids: Sequence[int]) -> str:
            return super().decode(token_ids).capitalize()

    model = Scripted(constant([1], [0.9]))
    model.tokenizer = Capital(["", *"abcdefghi"])
    rules = make_rules(model, max_new_tokens=100, eos_token_ids=(), stop=["A"])
    tokens = [2] + [1] * 50
    assert cut(tokens, rules)[2] == "length"
    assert not is_finished(tokens, 1, rules)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"block_size": 0}, "block_size must be"),
        ({"block_size": True}, "block_size must be"),
        ({"steps_per_block": 0}, "steps_per_block must be"),
        ({"threshold": float("nan")}, "threshold must be"),
        ({"temperature": -1.0}, "temperature must be"),
        ({"treshold": 0.5}, "did you mean threshold"),
    ],
)
def test_bad_parameters(params: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decoder_spec("block_diffusion", **params)
    if "treshold" not in params:
        with pytest.raises(ValueError, match=message):
            make_decoder(tiny_pair(), "reference", **params)


def test_specifications() -> None:
    """Defaults filled in; a specification makes the decoder that it describes, of its own version only."""
    spec = decoder_spec("block_diffusion", threshold=0.5)
    assert dict(spec.params)["block_size"] == 16
    [g] = from_spec(tiny_pair(), spec).generate([PROMPT], max_new_tokens=20)
    [wanted] = make_decoder(tiny_pair(), "block_diffusion", threshold=0.5).generate([PROMPT], max_new_tokens=20)
    assert g == wanted
    with pytest.raises(ValueError, match="version 99 was asked for"):
        from_spec(tiny_pair(), type(spec)(kind=spec.kind, params=spec.params, version=99))
    with pytest.raises(ValueError, match="did you mean block_diffusion"):
        decoder_spec("block_difusion")


@pytest.mark.parametrize("kind", ["block_diffusion", "mock_ar", "reference"])
def test_a_causal_model_has_no_denoiser(kind: str) -> None:
    with pytest.raises(ValueError, match="needs a two-tower checkpoint"):
        make_decoder(tiny_pair().context_tower, kind)


@given(
    tokens=st.lists(st.integers(0, 2**31), min_size=1, max_size=8),
    confidences=st.lists(st.floats(0, 1, width=32), min_size=8, max_size=8),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_tokens_and_confidences_travel_together_unchanged(
    tokens: list[int], confidences: list[float], dtype: torch.dtype
) -> None:
    given_tokens = torch.tensor(tokens)
    given_confidence = torch.tensor(confidences[: len(tokens)], dtype=dtype)
    ours = unpacked(packed(given_tokens, given_confidence), dtype)
    assert torch.equal(ours[0], given_tokens)
    assert torch.equal(ours[1], given_confidence)
    assert ours[1].dtype == dtype
