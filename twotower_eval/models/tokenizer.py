"""Text to token ids and back, from the ``tokenizer.json`` beside a checkpoint.

The ``tokenizers`` library alone: transformers' AutoTokenizer would cost two seconds of import for the same result.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers


class Tokenizer:
    """A fast tokenizer with the ids that generation needs."""

    def __init__(self, inner: tokenizers.Tokenizer, *, name: str, bos: str | None, eos: str | None) -> None:
        self._inner = inner
        self.name = name
        self.bos_token_id: int | None = inner.token_to_id(bos) if bos else None
        self.eos_token_id: int | None = inner.token_to_id(eos) if eos else None

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``."""
        ids: list[int] = self._inner.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        text: str = self._inner.decode(list(token_ids), skip_special_tokens=True)
        return text

    @property
    def max_token_id(self) -> int:
        """The largest id that encoding may give."""
        return max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1)


def load_tokenizer(folder: Path, *, vocab_size: int) -> Tokenizer | None:
    """The tokenizer in ``folder``; None where there is none. ValueError if it may give ids beyond ``vocab_size``."""
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    try:
        inner = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
    except Exception as error:  # the library raises bare Exception for a malformed file; said, not hidden
        raise ValueError(f"{file}: not a readable tokenizer.json ({error})") from error
    settings = _settings(folder / "tokenizer_config.json")
    tokenizer = Tokenizer(
        inner,
        name=folder.name,
        bos=_token_text(settings.get("bos_token")),
        eos=_token_text(settings.get("eos_token")),
    )
    if tokenizer.max_token_id >= vocab_size:
        raise ValueError(
            f"{file}: has token id {tokenizer.max_token_id}, but the model's vocab_size is {vocab_size}; "
            "this tokenizer belongs to another model"
        )
    return tokenizer


def _settings(file: Path) -> dict[str, Any]:
    if not file.exists():
        return {}
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return settings


def _token_text(token: str | dict[str, Any] | None) -> str | None:
    """Special tokens stand in the settings as text, or as an object with ``content``."""
    return token.get("content") if isinstance(token, dict) else token
