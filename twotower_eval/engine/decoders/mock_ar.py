"""The denoiser made to decode one token at a time, as a check that it knows the language: no mask, no time.

It is fed the last token on the context before that token; the context then absorbs the token.
"""

from __future__ import annotations

import torch

from twotower_eval.engine.decoders.autoregressive import Params
from twotower_eval.engine.decoders.batch import BatchDecoder, Call
from twotower_eval.engine.decoders.rows import choose


class MockAR(BatchDecoder[Params]):
    """One denoiser and one context forward per token."""

    KIND = "mock_ar"
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
