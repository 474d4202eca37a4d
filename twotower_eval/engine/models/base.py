"""What every loaded model carries besides its mathematics: identity, tokenizer, limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from torch import nn

from twotower_eval.engine.models.tokenizer import Tokenizer
from twotower_eval.records import Checkpoint, Ways

PACKAGE_PARENT = Path(__file__).resolve().parents[3]


def source_text(folder: Path) -> str:
    """Where a checkpoint came from, as records say it; for what the package ships, wherever it is installed, the
    place inside the package."""
    inside = folder.resolve().is_relative_to(PACKAGE_PARENT / "twotower_eval")
    return folder.resolve().relative_to(PACKAGE_PARENT).as_posix() if inside else str(folder)


class LanguageModel(nn.Module):
    """Base of all families. The attributes are set by the family's loader.

    ``context_digest`` covers the tensors of the causal tower alone, under the names of the pair's layout, so that a
    pair and its baseline can be shown to share them; ``folder_settings`` is what the other files of the checkpoint say
    (see models.identity). ``joins_contexts``: contexts have ``join``, and joined rows run
    together as well as rows that were prefilled together, so that a batch may take up new rows as others finish.
    ``branch_tokens`` is about how many tokens of a tree one call of ``tree_logits`` serves best; 0 where the model has
    no such method. ``rows_together``: prompts of a batch may run beside each other. Contexts longer than
    ``plain_beyond`` are to be scored as whole rows. ``ways``: how a model that is not ours proved to run rightly.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer | None = None
    vocab_size: int
    max_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    mask_token_id: int | None = None
    has_denoiser: bool = False
    joins_contexts: bool = True
    context_digest: str
    folder_settings: Mapping[str, object] = MappingProxyType({})
    branch_tokens: int = 0
    rows_together: bool = True
    plain_beyond: int | None = None
    ways: Ways | None = None
