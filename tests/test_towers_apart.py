"""Towers on two devices work at a time: the same tokens, and nothing waits between the two passes.

Two devices are pretended on a CPU, where the order of the calls is what can be seen of it.
"""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import tiny_config, tiny_pair

from twotower_eval import make_decoder
from twotower_eval.engine.decoders import block_diffusion
from twotower_eval.engine.models.checkpoint import build
from twotower_eval.engine.models.counting import WatchedModel
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.records import Prompt

PAIR = tiny_pair("all kinds")


def prompts_of(lengths: list[int], trace: bool = True) -> list[Prompt]:
    return [
        Prompt(id=str(n), token_ids=tuple(4 + (i * 5 + 3 * n) % 25 for i in range(length)), seed=n, trace=trace)
        for n, length in enumerate(lengths)
    ]


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    width=st.integers(1, 6),
    budget=st.integers(1, 14),
    block_size=st.integers(1, 5),
    threshold=st.sampled_from([0.15, 0.2, 0.3, 0.4]),
    temperature=st.sampled_from([0.0, 1.0]),
    batch_mean_t=st.booleans(),
)
def test_overlap_changes_no_answer(lengths, width, budget, block_size, threshold, temperature, batch_mean_t):
    """Tokens, counts and steps; only sums over other neighbours may round otherwise."""
    params: dict[str, Any] = {"block_size": block_size, "threshold": threshold, "temperature": temperature}
    decoder = make_decoder(PAIR, "block_diffusion", batch_mean_t=batch_mean_t, **params)
    options = {"max_new_tokens": budget, "eos_token_ids": (5, 9), "max_batch_size": width}
    expected = decoder.generate(prompts_of(lengths), **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TwoTower, "towers_apart", True)
        overlapped = decoder.generate(prompts_of(lengths), **options)
    for ours, theirs in zip(overlapped, expected, strict=True):
        assert dataclasses.replace(ours, trace=None) == dataclasses.replace(theirs, trace=None)
        assert [(s.block, s.step, s.positions, s.token_ids) for s in ours.trace] == [
            (s.block, s.step, s.positions, s.token_ids) for s in theirs.trace
        ]


def passes(monkeypatch: pytest.MonkeyPatch, lengths: list[int]) -> list[str]:
    """Passes of the towers and waits for the denoiser, in order."""
    seen: list[str] = []
    own = block_diffusion.on_host

    class Noted(WatchedModel):
        def extend(self, *args: Any) -> Any:
            seen.append("extend")
            return super().extend(*args)

        def denoise(self, *args: Any) -> torch.Tensor:
            seen.append("denoise")
            return super().denoise(*args)

    def noted(*args: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append("wait")
        return own(*args)

    with monkeypatch.context() as patch:
        patch.setattr(block_diffusion, "on_host", noted)
        decoder = make_decoder(Noted(PAIR), "block_diffusion", block_size=4, threshold=0.3)
        decoder.generate(prompts_of(lengths), max_new_tokens=12)
    return seen


def test_an_extension_is_on_its_way_before_the_denoiser_is_waited_for(monkeypatch):
    plain = " ".join(passes(monkeypatch, [3, 5, 8, 4, 6]))
    assert "extend" in plain
    assert "denoise extend" not in plain
    monkeypatch.setattr(TwoTower, "towers_apart", True)
    assert "denoise extend wait" in " ".join(passes(monkeypatch, [3, 5, 8, 4, 6]))


def test_a_row_alone_has_nothing_to_overlap(monkeypatch):
    plain = passes(monkeypatch, [5])
    monkeypatch.setattr(TwoTower, "towers_apart", True)
    assert passes(monkeypatch, [5]) == plain


def test_towers_are_apart_where_their_devices_are():
    assert not PAIR.towers_apart
    assert build(tiny_config("all kinds"), "pair", torch.float32, ("cpu", "meta")).towers_apart
