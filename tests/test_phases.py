"""Timed phases: they do what decoders do, count their repetitions, and leave the context they start from alone."""

import torch
from tiny_models import tiny_pair

from twotower_eval.measure.speed import costs
from twotower_eval.measure.speed.clock import CallClock, Devices


class Ticks:
    """A clock of whole seconds that moves by one each time something asks the model for something."""

    def __init__(self) -> None:
        self.s = 0.0

    def __call__(self) -> float:
        return self.s


class Spy:
    """A model that notes each call and its widths, and lets a second pass."""

    def __init__(self, model, ticks):
        self.model, self.ticks, self.calls = model, ticks, []

    def __getattr__(self, name):
        value = getattr(self.model, name)
        if name not in ("prefill", "extend", "denoise", "next_logits"):
            return value

        def noted(*args):
            self.ticks.s += 1
            length = args[0].max_length if name in ("extend", "next_logits") else None
            self.calls.append((name, length))
            return value(*args)

        return noted


def made_ready():
    ticks = Ticks()
    spy = Spy(tiny_pair(), ticks)
    with torch.inference_mode():
        context = tiny_pair().prefill(torch.full((2, 6), 5))
    return spy, context, CallClock(Devices(["cpu"]), ticks)


def test_a_prefill_reads_and_chooses():
    spy, _, clock = made_ready()
    walls_s = costs.time_repeats(costs.prefill(spy, torch.full((2, 6), 5)), clock, 3)
    assert walls_s == (2.0, 2.0, 2.0)
    assert [name for name, _ in spy.calls] == ["prefill", "next_logits"] * 3


def test_an_ar_step_goes_on_where_the_last_one_ended_and_copies_off_the_clock():
    spy, context, clock = made_ready()
    step = costs.ar_step(spy, context, torch.full((2, 1), 5))
    assert spy.calls == [("extend", 6)]
    assert costs.time_repeats(step, clock, 2) == (2.0, 2.0)
    assert spy.calls[1:] == [("extend", 7), ("next_logits", 8), ("extend", 8), ("next_logits", 9)]
    assert context.max_length == 6


def test_a_context_pass_takes_whole_blocks_and_no_logits():
    spy, context, clock = made_ready()
    passes = costs.context_pass(spy, context, torch.full((2, 4), 5))
    assert costs.time_repeats(passes, clock, 2) == (1.0, 1.0)
    assert spy.calls == [("extend", 6), ("extend", 10), ("extend", 14)]


def test_a_denoise_step_leaves_the_context_as_it_was():
    spy, context, clock = made_ready()
    block_BK = torch.full((2, 4), spy.mask_token_id)
    before = tiny_pair().denoise(block_BK, context, 1.0)
    assert costs.time_repeats(costs.denoise(spy, context, block_BK, 1.0), clock, 3) == (1.0, 1.0, 1.0)
    assert torch.equal(tiny_pair().denoise(block_BK, context, 1.0), before)


def test_a_forced_block_commits_what_it_is_told_and_is_absorbed():
    spy, context, clock = made_ready()
    absorbed = []
    extend = spy.model.extend

    class Keeping(Spy):
        def extend(self, context, ids_BK):
            absorbed.append(ids_BK.clone())
            self.ticks.s += 1
            return extend(context, ids_BK)

    spy = Keeping(spy.model, spy.ticks)
    block = costs.forced_block(spy, context, 4, [(1, 3), (2, 1, 1)])
    assert costs.time_repeats(block, clock, 3) == (3.0, 4.0, 3.0)
    assert len(absorbed) == 4
    assert all(bool((ids != spy.mask_token_id).all()) for ids in absorbed[1:])
