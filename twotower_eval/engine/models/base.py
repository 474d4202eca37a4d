"""What every loaded model has besides its mathematics: identity, tokenizer, limits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from torch import nn

from twotower_eval.engine.models.tokenizer import Tokenizer
from twotower_eval.records import Checkpoint, Ways

PACKAGE_PARENT = Path(__file__).resolve().parents[3]


def source_text(folder: Path) -> str:
    """The source of a checkpoint for records; for shipped ones the path inside the package, wherever it is
    installed."""
    inside = folder.resolve().is_relative_to(PACKAGE_PARENT / "twotower_eval")
    return folder.resolve().relative_to(PACKAGE_PARENT).as_posix() if inside else str(folder)


class LanguageModel(nn.Module):
    """Base of all families. The loader sets the attributes.

    ``context_digest`` covers the tensors of the causal tower only, under the names of the pair's layout, so that a pair
    and its baseline can be shown to share them. ``folder_settings`` are the settings in the checkpoint's other files
    (see models.identity). ``joins_contexts``: contexts have ``join``, and joined rows run together like rows that were
    prefilled together, so that a batch may admit new rows as others finish. ``branch_tokens`` is about the best number
    of tree tokens per call of ``tree_logits``; 0 if the model has no such method. ``rows_together``: prompts of a batch
    may run together. Contexts longer than ``plain_beyond`` are scored as whole rows. ``ways``: how a foreign model has
    to be run to be right. ``reads_prompts``: whether ``prefill`` and ``extend`` are forwards; not where a family keeps
    the tokens alone, and reads them in every call. ``two_way``: tokens that are read in one pass see each other in both
    directions, so that a row must not be read in other parts than it is decoded in. ``one_network``: what predicts
    masks reads the context, too, so that there is no causal tower.
    """

    checkpoint: Checkpoint
    tokenizer: Tokenizer | None = None
    vocab_size: int
    max_length: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    mask_token_id: int | None = None
    has_denoiser: bool = False
    one_network: bool = False
    joins_contexts: bool = True
    context_digest: str
    folder_settings: Mapping[str, object] = MappingProxyType({})
    branch_tokens: int = 0
    rows_together: bool = True
    plain_beyond: int | None = None
    ways: Ways | None = None
    reads_prompts: bool = True
    two_way: bool = False
