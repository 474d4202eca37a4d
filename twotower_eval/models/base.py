"""What every loaded model carries besides its mathematics: identity, tokenizer, limits."""

from __future__ import annotations

from torch import nn

from twotower_eval.models.tokenizer import Tokenizer
from twotower_eval.records import Checkpoint


class LanguageModel(nn.Module):
    """Base of all families. The attributes are set by the family's loader.

    ``context_digest`` covers the tensors of the causal tower alone, under the names of the pair's layout, so that a
    pair and its baseline can be shown to share them.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer | None = None
    vocab_size: int
    max_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    mask_token_id: int | None = None
    has_denoiser: bool = False
    context_digest: str
