"""MDLM's samplers (arXiv 2406.07524): ancestral, ancestral with predictions kept while nothing changes, and analytic;
with ``stride`` semi-autoregressive. Shape letters: G tokens of a canvas, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import Call
from twotower_eval.engine.decoders.rows import Noise, check_counts
from twotower_eval.engine.decoders.sampled import Draft, SampledDecoder, race, without_mask
from twotower_eval.engine.schedules import LogLinear
from twotower_eval.errors import UserError

PREDICTORS = ("ddpm", "ddpm_cache", "analytic")
SCHEDULE = LogLinear()


@dataclass(frozen=True, kw_only=True)
class Params:
    """``predictor``: ``ddpm`` reads logits in every step and follows the network's own schedule; ``ddpm_cache`` keeps
    them while no token changes, and masks with probability t; ``analytic`` goes by scores, and draws its last tokens,
    which the others take as the most likely ones. ``steps`` None: as many as tokens. Time runs from 1 to ``eps``.

    ``stride`` writes past the network's length: a window of it moves on by so many tokens, from time 1 to 0 each.
    ``all_steps`` goes on when nothing is masked any more, as published samplers do, which changes no canvas.
    ``whole_batch`` keeps logits only while no row of the batch changes.
    """

    predictor: Literal["ddpm", "ddpm_cache", "analytic"] = "ddpm_cache"
    steps: int | None = None
    eps: float = 1e-5
    stride: int | None = None
    all_steps: bool = False
    whole_batch: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "steps", "stride")
        if self.predictor not in PREDICTORS:
            raise UserError(f"predictor must be one of {', '.join(PREDICTORS)}, not {self.predictor!r}")
        if not 0 < self.eps < 1:
            raise UserError(f"eps must lie between 0 and 1, not {self.eps!r}")
        if self.stride is not None and self.predictor != "ddpm_cache":
            raise UserError(f"stride goes with predictor ddpm_cache, not with {self.predictor}")


class Ancestral(SampledDecoder[Params]):
    """Ancestral sampling."""

    KIND = "ancestral"
    Params = Params
    VERSION = 1

    def num_steps(self, draft: Draft) -> int:
        """Those planned, with a stride one at time 0, and the one that leaves no mask."""
        return self._num_planned(draft) + (self.params.stride is not None) + 1

    def is_done(self, draft: Draft) -> bool:
        """Also when nothing is masked any more, unless all steps are asked for."""
        over = draft.step >= self.num_steps(draft)
        return over if self.params.all_steps else over or not bool(draft.masked_G.any())

    def rereads(self, draft: Draft) -> bool:
        """The last step always, and all of a sampler that keeps nothing."""
        return self.params.predictor != "ddpm_cache" or self._is_last(draft)

    @property
    def reads_together(self) -> bool:
        """As asked for."""
        return self.params.whole_batch

    @property
    def _depends_on_neighbours(self) -> bool:
        return self.params.whole_batch

    def time(self, draft: Draft) -> float | None:
        """That of the step."""
        return float(self._times(draft)[0])

    def width(self, call: Call, row: int) -> int:
        """The whole answer; with a stride what a window has room for, at least the stride."""
        if self.params.stride is None:
            return call.rules.max_new_tokens
        num = len(call.prompts[row].token_ids) + len(call.rows[row].produced)
        return max(self._length(call) - num, self.params.stride)

    def window(self, call: Call, row: int) -> list[int] | None:
        """With a stride the last tokens of prompt and answer for which there is room."""
        if self.params.stride is None:
            return None
        tokens = [*call.prompts[row].token_ids, *call.rows[row].produced]
        return tokens[max(len(tokens) - (self._length(call) - self.width(call, row)), 0) :]

    def _length(self, call: Call) -> int:
        length, stride = self.model.max_length or 0, self.params.stride or 0
        if length < stride:
            raise UserError(f"stride {stride} is more than the {length} tokens that the model reads")
        return length

    def _num_planned(self, draft: Draft) -> int:
        return self.params.steps or len(draft.tokens_G)

    def _is_last(self, draft: Draft) -> bool:
        return draft.step >= self.num_steps(draft) - 1

    def _times(self, draft: Draft) -> tuple[Tensor, Tensor]:
        """Time before and after the step."""
        num = self._num_planned(draft)
        if self.params.stride is not None:
            t = torch.tensor(1 - min(draft.step, num) * (1 / num))
            return t, t - 1 / num
        t = torch.linspace(1, self.params.eps, num + 1)[min(draft.step, num)]
        return t, t - (1 - self.params.eps) / num

    def drawn(self, draft: Draft, chosen_G: Tensor, noise: Noise, row: int) -> Tensor:
        """By the predictor, or the most likely tokens in the last step."""
        probability_GV = without_mask(draft.logits, draft.mask_id)
        last, analytic = self._is_last(draft), self.params.predictor == "analytic"
        if last and not analytic:
            return probability_GV.argmax(-1)
        t, s = self._times(draft)
        if analytic:
            weight_GV = analytic_weights(probability_GV, draft.mask_id, t, None if last else s)
        else:
            chance = SCHEDULE.masked if self.params.predictor == "ddpm" else lambda time: time
            weight_GV = ancestral_weights(probability_GV, draft.mask_id, chance(t), chance(s))
        return race(weight_GV, noise.uniform(row, weight_GV.numel()).view_as(weight_GV))


def ancestral_weights(probability_GV: Tensor, mask_id: int, masked_t: Tensor, masked_s: Tensor) -> Tensor:
    """Unnormalised probabilities of what a mask becomes, if tokens are masked with these probabilities before and after
    the step: below 0 for the mask, it cannot stay one."""
    weight_GV = probability_GV * (masked_t - masked_s)
    weight_GV[..., mask_id] = masked_s
    return weight_GV


def analytic_weights(probability_GV: Tensor, mask_id: int, t: Tensor, s: Tensor | None) -> Tensor:
    """The same by the score, staggered to the step's end (Lou et al., arXiv 2310.16834); ``s`` None: down to no noise
    at all, where nothing stays a mask."""
    sigma = SCHEDULE.sigma(t)
    step = sigma if s is None else sigma - SCHEDULE.sigma(s)
    score_GV = torch.exp(probability_GV.log() - torch.log(torch.expm1(sigma)))
    score_GV[..., mask_id] = 1
    staggered_GV = score_GV * step.exp()
    staggered_GV[..., mask_id] += (1 - step.exp()) * score_GV.sum(-1)
    transition_V = torch.full(score_GV.shape[-1:], float(1 - torch.exp(-step)))
    transition_V[mask_id] += torch.exp(-step)
    weight_GV = staggered_GV * transition_V
    if s is None:
        weight_GV[..., mask_id] = 0
    return weight_GV
