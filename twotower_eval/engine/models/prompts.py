"""Texts as a model reads them, and the stops of its answers: the rules of lm-eval's ``hf``, for whoever asks a model.

Errors name ``where`` a text comes from, so that its document can be found.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from twotower_eval.engine.models.protocol import Model, text_codec
from twotower_eval.engine.models.tokenizer import encode_once
from twotower_eval.errors import UserError


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Say where a text comes from in whatever is wrong with it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def end_of_text_id(model: Model) -> int:
    """The tokenizer's EOS, else the first of the model's. UserError where neither has one."""
    ids = _end_of_text_ids(model)
    if not ids:
        raise UserError(f"checkpoint {model.checkpoint.name} names no EOS token, which empty contexts need")
    return ids[0]


def prefix_id(model: Model) -> int:
    """What stands before a text without context: the tokenizer's BOS, else the end of a text."""
    bos = text_codec(model).bos_token_id
    return end_of_text_id(model) if bos is None else int(bos)


def _end_of_text_ids(model: Model) -> list[int]:
    own = text_codec(model).eos_token_id
    return [*([] if own is None else [int(own)]), *map(int, model.eos_token_ids)]


def prompt_ids(model: Model, text: str) -> list[int]:
    """Token ids of the prompt of a generation, with what the tokenizer adds by itself, unless it begins with BOS."""
    bos = text_codec(model).bos_token_id
    return encode_once(text_codec(model), text, None if bos is None else int(bos)) or [prefix_id(model)]


def text_ids(model: Model, text: str) -> list[int]:
    """Token ids of a text to be scored, with what the tokenizer adds by itself, unless it begins with the prefix.

    A model without a prefix reads it too: only texts without context need one.
    """
    knows_one = text_codec(model).bos_token_id is not None or _end_of_text_ids(model)
    return encode_once(text_codec(model), text, prefix_id(model) if knows_one else None)


def fitted_prompt_ids(model: Model, text: str, budget: int) -> tuple[list[int], bool]:
    """Token ids of a prompt, its beginning cut off where the model has no room for all and ``budget`` new tokens; and
    whether it was."""
    ids = prompt_ids(model, text)
    if model.max_length is None:
        return ids, False
    room = model.max_length - budget
    if room < 1:
        raise UserError(
            f"a budget of {budget} new tokens leaves no room for the prompt in the model's {model.max_length} tokens: "
            "give --max-new-tokens (run) or --new-tokens (speed)"
        )
    return ids[-room:], len(ids) > room


def stops_of(model: Model, stop: Sequence[str]) -> tuple[str, ...]:
    """Stop strings with the text of the tokenizer's EOS, which a model may also spell out."""
    eos = text_codec(model).eos_token_id
    text = "" if eos is None else text_codec(model).decode_with_special([eos])
    return tuple(dict.fromkeys([*stop, *([text] if text else [])]))
