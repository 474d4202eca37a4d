"""What families of one network have in common: what predicts masks reads the context, too, so that there is no causal
tower. Shape letters: B rows, K block, V vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic

import torch
from torch import Tensor

from twotower_eval.engine.models.base import LanguageModel
from twotower_eval.engine.models.protocol import ContextT
from twotower_eval.errors import UserError


class OneNetwork(LanguageModel, Generic[ContextT]):
    """Base of these families: they define :meth:`denoise`."""

    mask_token_id: int
    has_denoiser = one_network = True

    def denoise(self, block_BK: Tensor, context: ContextT, t_B: object = None) -> Tensor:
        """Logits (B, K, V) float32 of the token at each position of a block behind the context, which is not changed.

        ``t_B`` has no effect where a network takes no time.
        """
        raise AssertionError(f"{type(self).__name__} does not define denoise")

    def next_logits(self, context: ContextT) -> Tensor:
        """Logits (B, V) of a single mask behind each row: a forward, unlike that of a causal model."""
        return self.denoise(torch.full((len(context.lengths), 1), self.mask_token_id), context)[:, 0]

    def context_logits(
        self, ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None = None, *, last: int | None = None
    ) -> Tensor:
        """UserError: the model predicts a token from those on both sides of it."""
        raise UserError(
            f"{self.checkpoint.name} ({self.checkpoint.family}) has no causal log-likelihoods: "
            "take --likelihood denoiser_left_to_right or bound"
        )


def own_lengths(ids_BS: Tensor, lengths_B: Tensor | Sequence[int] | None) -> list[int]:
    """Tokens of each row; all columns where nothing else is said."""
    return [ids_BS.shape[1]] * len(ids_BS) if lengths_B is None else [int(length) for length in lengths_B]
