"""Decoders of one token at a time: the baseline, and the denoiser used like one, to check that it knows the
language."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from twotower_eval.engine.decoders.batch import BatchDecoder, Call
from twotower_eval.engine.decoders.rows import check_temperature, choose


@dataclass(frozen=True, kw_only=True)
class Params:
    """``temperature`` 0 is greedy."""

    temperature: float = 0.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)


class Autoregressive(BatchDecoder[Params]):
    """n useful tokens cost n context forwards: the prefill gives the first, each extension one more."""

    KIND = "autoregressive"
    NEEDS_DENOISER = False
    Params = Params
    VERSION = 1

    def _decode(self, call: Call) -> None:
        one_by_one(call, self.params.temperature)


def one_by_one(call: Call, temperature: float) -> None:
    """Decode a call token by token: the prefill gives the first, each extension one more."""
    context = call.admit()
    while context is not None:
        tokens_B = choose(call.counted.next_logits(context), temperature, call.noise, context.rows)
        tokens_B1 = tokens_B[:, None].cpu()
        going = call.absorb(context.rows, tokens_B1.tolist())
        context = call.admit(call.extended(context, going, tokens_B1))


class MockAR(BatchDecoder[Params]):
    """One denoiser and one context forward per token."""

    KIND = "mock_ar"
    NEEDS = "two towers"
    Params = Params
    VERSION = 1

    def _decode(self, call: Call) -> None:
        context = call.admit(without_last=1)
        while context is not None:
            last_B1 = torch.tensor([[call.last_token(row)] for row in context.rows])
            logits_BV = call.counted.denoise(last_B1, context, None)[:, 0]
            tokens_B1 = choose(logits_BV, self.params.temperature, call.noise, context.rows)[:, None].cpu()
            going = call.absorb(context.rows, tokens_B1.tolist())
            context = call.admit(call.extended(context, going, last_B1), without_last=1)
