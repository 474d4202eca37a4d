"""The denoiser made to decode one token at a time, as a check that it knows the language: no mask, no time.

It is fed the last token on the context before that token; the context then absorbs the token.
"""

from __future__ import annotations

import torch

from twotower_eval.decoders.autoregressive import Params
from twotower_eval.decoders.batch import BatchDecoder, Call
from twotower_eval.decoders.rows import choose


class MockAR(BatchDecoder):
    """One denoiser and one context forward per token."""

    KIND = "mock_ar"
    Params = Params
    VERSION = 1

    def _decode(self, call: Call) -> None:
        context = call.prefill(without_last=1)
        last_B1 = torch.tensor([prompt.token_ids[-1:] for prompt in call.prompts])
        while True:
            logits_BV = call.counted.denoise(last_B1, context, None)[:, 0]
            tokens_B1 = choose(logits_BV, self.params.temperature, call.noise, context.rows)[:, None].cpu()
            going = call.absorb(context.rows, tokens_B1.tolist())
            if not going:
                return
            context = call.counted.extend(context.select(going), last_B1[going])
            last_B1 = tokens_B1[going]
