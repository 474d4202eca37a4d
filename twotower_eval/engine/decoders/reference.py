"""The reference decoder, slow and simple: one prompt at a time, everything recomputed from the tokens each time.

It shares no loop, cache or commit code with the fast decoders, so that they can be tested against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import check_mask, misfit, no_denoiser
from twotower_eval.engine.decoders.block_diffusion import Params as BlockParams
from twotower_eval.engine.decoders.rows import (
    Clock,
    OnFinish,
    check_batch_size,
    check_prompts,
    check_temperature,
    generation,
    is_finished,
    make_rules,
)
from twotower_eval.engine.models.protocol import Model, two_tower
from twotower_eval.errors import UserError
from twotower_eval.records import Generation, Prompt

MODES = ("autoregressive", "mock_ar", "block_diffusion")


@dataclass(frozen=True, kw_only=True)
class Params:
    """``mode`` selects the decoder to imitate; block parameters matter for ``block_diffusion`` only."""

    mode: Literal["autoregressive", "mock_ar", "block_diffusion"] = "block_diffusion"
    block_size: int = 16
    steps_per_block: int | None = None
    threshold: float = 0.8
    temperature: float = 0.0

    def __post_init__(self) -> None:
        check_temperature(self.temperature)
        if self.mode not in MODES:
            raise UserError(f"mode {self.mode!r} is unknown; choose from {', '.join(MODES)}")
        BlockParams(block_size=self.block_size, steps_per_block=self.steps_per_block, threshold=self.threshold)


_Params = Params  # inside the class its attribute hides the name


class Reference:
    """Greedy or sampled, with the same random streams as the fast decoders."""

    Params = Params
    VERSION = 1

    def __init__(self, model: Model, params: _Params, *, clock: Clock | None = None) -> None:
        if reason := misfit(params.mode, "causal" if params.mode == "autoregressive" else "two towers", model):
            raise UserError(reason if model.has_denoiser else f"{reason}: give --decoder autoregressive")
        self._pair = None if params.mode == "autoregressive" else two_tower(model, no_denoiser(params.mode))
        if self._pair is not None:
            check_mask(model, f"decoder {params.mode!r}")
        self.model, self.params, self.clock = model, params, clock

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        eos_token_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        max_batch_size: int | None = None,
        on_finish: OnFinish | None = None,
    ) -> list[Generation]:
        """See :class:`twotower_eval.engine.decoders.Decoder`; one prompt at a time is within any ``max_batch_size``."""
        check_batch_size(max_batch_size)
        rules = make_rules(self.model, max_new_tokens=max_new_tokens, eos_token_ids=eos_token_ids, stop=stop)
        check_prompts(self.model, prompts)
        started = self.clock() if self.clock else 0.0
        generations = []
        for prompt in prompts:
            generator = torch.Generator().manual_seed(prompt.seed)
            produced: list[int] = []
            num_context, num_denoiser, num_forced = 0, 0, 0
            while True:
                known = [*prompt.token_ids, *produced]
                if self.params.mode == "block_diffusion":
                    new, calls, forced = self._block(known, generator)
                    num_denoiser, num_forced = num_denoiser + calls, num_forced + forced
                else:
                    new = [self._one(known, generator)]
                    num_denoiser += self.params.mode == "mock_ar"
                # The denoiser alone reads all but the last token: nothing of a prompt of one, which is no forward.
                num_context += len(known) > (self.params.mode == "mock_ar")
                produced.extend(new)
                if is_finished(produced, len(new), rules):
                    break
            generations.append(
                generation(
                    prompt,
                    produced,
                    rules,
                    num_context_forwards=num_context,
                    num_denoiser_forwards=num_denoiser,
                    num_forced_commits=num_forced if self.params.mode == "block_diffusion" else None,
                    finish_s=self.clock() - started if self.clock else None,
                )
            )
            if on_finish:
                on_finish(generations[-1])
        return generations

    def _one(self, known: list[int], generator: torch.Generator) -> int:
        """The next token, by one causal pass, or by the denoiser on the context without the last token."""
        if self.params.mode == "autoregressive":
            logits_V = self.model.context_logits(torch.tensor([known]))[0, -1]
        else:
            assert self._pair is not None
            context = self._pair.prefill(torch.tensor([known[:-1]], dtype=torch.int64).view(1, -1))
            logits_V = self._pair.denoise(torch.tensor([known[-1:]]), context, None)[0, 0]
        return int(self._pick(logits_V, generator))

    def _block(self, known: list[int], generator: torch.Generator) -> tuple[list[int], int, int]:
        """A finished block, its number of denoiser calls, and its forced commits."""
        assert self._pair is not None
        params, mask = self.params, self._pair.mask_token_id
        num_steps = params.steps_per_block or params.block_size
        block = [mask] * params.block_size
        open_positions = list(range(params.block_size))
        calls = forced = 0
        context = self._pair.prefill(torch.tensor([known]))
        for step in range(num_steps):
            if not open_positions:
                break
            fraction = len(open_positions) / params.block_size
            logits_KV = self._pair.denoise(torch.tensor([block]), context, [fraction])[0]
            logits_KV[:, mask] = -math.inf
            calls += 1
            tokens = self._pick(logits_KV, generator).tolist()
            sure = [float(logits_KV[i].float().softmax(-1)[tokens[i]]) for i in range(params.block_size)]
            above = [i for i in open_positions if sure[i] > params.threshold]
            count = max(1, len(above), math.ceil(len(open_positions) / (num_steps - step)))
            ranked = sorted(open_positions, key=lambda i: (sure[i], i), reverse=True)
            for i in ranked[:count]:
                block[i] = tokens[i]
                open_positions.remove(i)
                forced += i not in above
        return block, calls, forced

    def _pick(self, logits: Tensor, generator: torch.Generator) -> Tensor:
        """Argmax, or a Gumbel-max sample."""
        if self.params.temperature > 0:
            uniform = torch.rand(tuple(logits.shape), generator=generator).clamp(min=1e-20, max=1 - 1e-7)
            logits = logits / self.params.temperature - torch.log(-torch.log(uniform)).to(logits.device)
        return logits.argmax(-1)
