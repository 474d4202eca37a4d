"""Pairs of random weights: where they lie, what they share, which experts they are made to take, what they weigh."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import ARCHITECTURES, tiny_config

from twotower_eval.engine.models.config import (
    Step,
    expected_touched,
    key_value_bytes,
    pair_bytes,
    state_bytes,
    step_bytes,
    step_flops,
    touched_experts,
    tower_bytes,
)
from twotower_eval.measure.sizing.pairs import build_random_pair, draw, steer, with_layers
from twotower_eval.records import ROUTINGS


def build(name="all kinds", dtype=torch.float32, seed=0, share_towers=False, devices=("cpu",)):
    return build_random_pair(
        tiny_config(name), name="tiny", dtype=dtype, devices=devices, seed=seed, share_towers=share_towers
    )


def stored_bytes(pair):
    return sum(parameter.nbytes for parameter in pair.parameters())  # a shared parameter is given once


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("share_towers", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_are_those_of_the_model(name, share_towers, dtype):
    pair = build(name, dtype, share_towers=share_towers)
    assert pair_bytes(pair.config, dtype.itemsize, share_towers=share_towers) == stored_bytes(pair)
    context = pair.prefill(torch.full((2, 5), 7))
    state = sum(tensor.nbytes for state in context.mamba.values() for tensor in state)
    assert 2 * state_bytes(pair.config, dtype.itemsize) == state
    slots = [*context.buffer.keys.values(), *context.buffer.values.values()]
    per_slot = sum(tensor.nbytes for tensor in slots) / context.buffer.capacity
    assert 2 * key_value_bytes(pair.config, dtype.itemsize) == per_slot


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_seed_gives_the_same_finite_logits(dtype):
    ids, block = torch.full((2, 5), 7), torch.full((2, 4), 3)
    answers = []
    for seed in (0, 0, 1):
        pair = build(seed=seed, dtype=dtype)
        context = pair.prefill(ids)
        answers.append(torch.cat([pair.next_logits(context)[:, None], pair.denoise(block, context, 1.0)], dim=1))
    assert torch.equal(answers[0], answers[1])
    assert not torch.equal(answers[0], answers[2])
    assert torch.isfinite(answers[0]).all()


def test_shared_towers_are_one_set_of_weights_with_two_heads():
    pair = build(share_towers=True)
    assert pair.denoiser.tower is pair.context_tower.tower
    assert not torch.equal(pair.denoiser.head.weight, pair.context_tower.head.weight)
    assert build().checkpoint.digest != pair.checkpoint.digest
    with pytest.raises(ValueError, match="on one device"):
        build(share_towers=True, devices=("cpu", "cpu:0"))


def test_names_say_that_weights_are_random():
    assert build().checkpoint.name == "tiny (random weights)"
    assert build().checkpoint.source == "random weights, seed 0"


def test_a_pair_of_some_layers_is_those_layers():
    pair = build()
    small = with_layers(pair, [0, 2, 4])
    assert small.config.pattern == "M*M"
    held = {parameter.data_ptr() for parameter in pair.parameters()}
    assert all(parameter.data_ptr() in held for parameter in small.parameters())
    assert small.checkpoint.digest != pair.checkpoint.digest
    context = small.prefill(torch.full((1, 5), 7))
    assert sorted(context.mamba) == [0, 2]
    assert torch.isfinite(small.denoise(torch.full((1, 4), 3), context, 0.5)).all()
    whole = with_layers(pair, range(5))
    assert torch.equal(whole.context_logits(torch.full((1, 5), 7)), pair.context_logits(torch.full((1, 5), 7)))


def test_forced_routing_counts_what_it_forces_and_lets_go():
    pair = build("all kinds")
    ids = torch.arange(16)[None]
    free = pair.context_logits(ids)
    routing = steer(pair, seed=1)
    assert torch.equal(pair.context_logits(ids), free)
    touched = {}
    for kind in ROUTINGS:
        routing.kind = kind
        routing.count_touched()
        logits = [pair.context_logits(ids) for _ in range(2)]
        touched[kind] = routing.mean_touched()
        assert torch.equal(*logits)
        assert not torch.equal(logits[0], free)
    assert touched["shared"] == 2
    assert touched["shared"] < touched["half"] <= touched["independent"] <= 8
    routing.kind = None
    assert torch.equal(pair.context_logits(ids), free)
    assert routing.mean_touched() is None


@given(
    kind=st.sampled_from(ROUTINGS),
    batch_size=st.integers(1, 3),
    num_tokens=st.integers(1, 12),
    experts_per_token=st.integers(1, 6),
    num_experts=st.integers(6, 20),
    seed=st.integers(0, 100),
)
def test_a_token_never_takes_an_expert_twice(kind, batch_size, num_tokens, experts_per_token, num_experts, seed):
    generator = torch.Generator().manual_seed(seed)
    table_BSA = draw(kind, torch.Size((batch_size, num_tokens)), experts_per_token, num_experts, generator)
    assert table_BSA.shape == (batch_size, num_tokens, experts_per_token)
    assert 0 <= int(table_BSA.min()) <= int(table_BSA.max()) < num_experts
    for row_SA in table_BSA:
        sets = [set(token.tolist()) for token in row_SA]
        assert all(len(chosen) == experts_per_token for chosen in sets)
        common = {"shared": experts_per_token, "half": experts_per_token // 2, "independent": 0}[kind]
        assert len(set.intersection(*sets)) >= common


@settings(max_examples=12, deadline=None)
@given(kind=st.sampled_from(ROUTINGS), batch_size=st.integers(1, 3), num_tokens=st.integers(1, 16))
def test_expected_distinct_experts_are_the_mean_of_draws(kind, batch_size, num_tokens):
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size((batch_size, num_tokens))
    counts = [draw(kind, shape, 3, 16, generator).unique().numel() for _ in range(400)]
    assert sum(counts) / 400 == pytest.approx(expected_touched(kind, batch_size, num_tokens, 3, 16), abs=0.35)


def test_bytes_and_arithmetic_of_the_released_size():
    """Published: 31.6B parameters a tower, 3.58B of them active; 118 GiB in bfloat16 for the two."""
    import json

    from twotower_eval.engine.models.config import parse_config
    from twotower_eval.resources import data_path

    file = data_path("tasks", "configs", "nemotron-labs-twotower-30b-a3b.config.json")
    config = parse_config(json.loads(file.read_text()))
    assert tower_bytes(config, 2) / 2 == pytest.approx(31.6e9, rel=0.002)
    assert pair_bytes(config, 2, share_towers=False) / 2**30 == pytest.approx(118, rel=0.005)
    step = Step(part="ar_step", batch_size=1, num_tokens=1, context_tokens=0, routing="independent")
    embeddings = config.vocab_size * config.hidden_size
    assert step_bytes(step, config, 2) / 2 + embeddings == pytest.approx(3.58e9, rel=0.03)
    assert touched_experts(step, config) == pytest.approx(6)
    assert step_flops(step, config) / 2 + embeddings == pytest.approx(3.58e9, rel=0.04)
