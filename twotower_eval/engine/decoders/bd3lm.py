"""BD3-LM's sampler (arXiv 2503.09573): block after block, in each either one mask at a time (first hitting) or by steps
through time. Shape letters: K tokens of a block, V vocabulary."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_eval.engine.decoders.batch import Call
from twotower_eval.engine.decoders.rows import Noise, check_counts, check_top_p
from twotower_eval.engine.decoders.sampled import Draft, SampledDecoder, race, without_mask
from twotower_eval.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Params:
    """``first_hitting`` draws all tokens of a block, and keeps one at a random mask; without it a block takes up to
    ``steps`` steps from time 1 to 0. ``steps`` None: as many as a block has tokens. ``top_p`` keeps the most likely
    tokens that together hold it.

    Published samplers' ways: ``drop_crossing`` leaves out the token that crosses ``top_p``; ``zero_at_end`` makes
    token 0 of what is still masked at time 0; ``whole_batch`` has all rows of a batch begin a block together.
    """

    first_hitting: bool = True
    steps: int | None = None
    top_p: float | None = None
    drop_crossing: bool = False
    zero_at_end: bool = False
    whole_batch: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        check_counts(self, "steps")
        check_top_p(self.top_p)


class BD3LM(SampledDecoder[Params]):
    """BD3-LM's semi-autoregressive sampler."""

    KIND = "bd3lm"
    NEEDS_PROMPT = True
    READS_BLOCKS = True
    Params = Params
    VERSION = 1

    def num_steps(self, draft: Draft) -> int:
        """One for each token, or those planned."""
        num = len(draft.tokens_G)
        return num if self.params.first_hitting else self.params.steps or num

    def block_size(self) -> int:
        """That of the network."""
        size = getattr(self.model, "block_size", None)
        if size is None:
            raise UserError("decoder 'bd3lm' needs a model that reads blocks, as BD3-LM does")
        return int(size)

    @property
    def reads_together(self) -> bool:
        """As asked for."""
        return self.params.whole_batch

    @property
    def _depends_on_neighbours(self) -> bool:
        return self.params.whole_batch

    def rereads(self, draft: Draft) -> bool:
        """Logits are kept while nothing changes."""
        return False

    def width(self, call: Call, row: int) -> int:
        """A block."""
        return self.block_size()

    def drawn(self, draft: Draft, chosen_G: Tensor, noise: Noise, row: int) -> Tensor:
        """One token at a random mask, or a token or a mask at each."""
        probability_KV = without_mask(draft.logits, draft.mask_id).double()
        if self.params.top_p is not None and self.params.top_p < 1:
            probability_KV = nucleus(probability_KV, self.params.top_p, drop_crossing=self.params.drop_crossing)
        if not self.params.first_hitting:
            t, dt = self._times(draft)
            if t == 0:
                noise.uniform(row, probability_KV.numel())
                return torch.zeros_like(draft.tokens_G) if self.params.zero_at_end else probability_KV.argmax(-1)
            stays = (t - dt) / t
            probability_KV = probability_KV * (1 - stays)
            probability_KV[:, draft.mask_id] = stays
        tokens_K = race(probability_KV, noise.uniform(row, probability_KV.numel()).view_as(probability_KV))
        if not self.params.first_hitting:
            return tokens_K
        places = draft.masked_G.nonzero().flatten()
        place = places[min(int(noise.uniform(row, 1) * len(places)), len(places) - 1)]
        made_K = draft.tokens_G.clone()
        made_K[place] = tokens_K[place]
        return made_K

    def _times(self, draft: Draft) -> tuple[float, float]:
        num = self.num_steps(draft)
        return float(torch.linspace(1, 0, num, dtype=torch.float64)[draft.step]), 1 / num


def nucleus(probability: Tensor, top_p: float, *, drop_crossing: bool) -> Tensor:
    """Probabilities (..., V) of the most likely tokens that together hold ``top_p``, renormalised; the token that
    crosses it is the last one, or left out unless it is the first.

    >>> nucleus(torch.tensor([0.5, 0.3, 0.2]), 0.6, drop_crossing=True).tolist()
    [1.0, 0.0, 0.0]
    """
    ordered, order = probability.sort(descending=True, dim=-1, stable=True)
    total = ordered.cumsum(-1)
    inside = total <= top_p if drop_crossing else total - ordered < top_p
    inside[..., 0] = True
    kept = torch.zeros_like(probability).scatter(-1, order, ordered * inside)
    return kept / kept.sum(-1, keepdim=True)
