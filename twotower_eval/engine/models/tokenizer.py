"""Text to token ids and back, by the ``tokenizer.json`` beside a checkpoint; prompts and stops as in lm-eval's
``hf``."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import tokenizers

from twotower_eval.engine.models.chat import format_of
from twotower_eval.engine.models.protocol import Model, TextCodec, text_codec
from twotower_eval.errors import FileError, UserError
from twotower_eval.strict import JsonObject, parse_json, read_utf8

FLAGS = ("lstrip", "rstrip", "single_word", "normalized")  # of an added token: how it is found in a text
# What transformers takes back of a text's spaces where a tokenizer asks for it, in its order.
CLEANED_UP = (
    (" .", "."),
    (" ?", "?"),
    (" !", "!"),
    (" ,", ","),
    (" ' ", "'"),
    (" n't", "n't"),
    (" 'm", "'m"),
    (" 's", "'s"),
    (" 've", "'ve"),
    (" 're", "'re"),
)


def encode_once(tokenizer: TextCodec, text: str, first: int | None) -> list[int]:
    """Token ids with the special tokens that the tokenizer adds itself, unless the text begins with ``first``."""
    mark = "" if first is None else tokenizer.decode_with_special([first])
    return tokenizer.encode(text, not (mark and text.startswith(mark)))


class Tokenizer:
    """A fast tokenizer with the ids that generation needs.

    Texts are always encoded whole and alike: truncation, padding and dropout, which tokenizer.json may keep from
    training, are off. ``vocab_size`` is the model's: ids beyond it have no meaning.
    """

    def __init__(
        self,
        inner: tokenizers.Tokenizer,
        *,
        name: str,
        vocab_size: int,
        bos: str | None,
        eos: str | None,
        cleans_up: bool = False,
    ) -> None:
        inner.no_truncation()
        inner.no_padding()
        if isinstance(inner.model, tokenizers.models.BPE):
            inner.model.dropout = None
        self._inner = inner
        self._cleans_up = cleans_up
        self.name = name
        self.vocab_size = vocab_size
        self.bos_token_id: int | None = inner.token_to_id(bos) if bos else None
        self.eos_token_id: int | None = inner.token_to_id(eos) if eos else None
        added = inner.get_added_tokens_decoder()
        self.special_token_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._of_nothing = {special: inner.encode("", add_special_tokens=special).ids for special in (False, True)}

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Token ids of ``text``. UserError if it is no valid text, gives no token, or needs a token that the model
        lacks."""
        try:
            ids: list[int] = self._inner.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:  # what the library says of half a surrogate pair
            raise UserError(f"{_shown(text)} holds half of a surrogate pair, which no tokenizer reads") from error
        if text and ids == self._of_nothing[add_special_tokens]:
            raise UserError(f"the tokenizer makes no token of the text {_shown(text)}")
        if ids and max(ids) >= self.vocab_size:
            beyond = self._inner.id_to_token(max(ids))
            raise UserError(
                f"{_shown(text)} holds the token {beyond!r} with id {max(ids)}, and the model knows {self.vocab_size} "
                "tokens only"
            )
        return ids

    def prompt_ids(self, text: str) -> list[int]:
        """Token ids of a generation's prompt, with the special tokens that the tokenizer adds itself, unless it begins
        with BOS."""
        return encode_once(self, text, self.bos_token_id)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._decode(token_ids, skip_special_tokens=True)

    def decode_with_special(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens written out."""
        return self._decode(token_ids, skip_special_tokens=False)

    def _decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        text: str = self._inner.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        for spaced, tight in CLEANED_UP if self._cleans_up else ():
            text = text.replace(spaced, tight)
        return text


def load_tokenizer(
    folder: Path, *, vocab_size: int, unnamed: Callable[[Path], Mapping[str, str]] = lambda _: {}
) -> Tokenizer | None:
    """The tokenizer in ``folder``; None if there is none.

    Added tokens may lie beyond ``vocab_size``: they are refused when a text uses one. UserError if others do.
    ``unnamed`` supplies BOS and EOS if the settings lack one of them.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    text = read_utf8(file)
    try:
        inner = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for a malformed file; said, not hidden
        raise FileError(f"{file}: not a readable tokenizer.json ({error})") from error
    _check_size(file, inner, vocab_size)
    settings = _settings(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:  # as in transformers: an older file, ignored if the newer one exists
        settings |= _settings(folder / "special_tokens_map.json")
    if not {"bos_token", "eos_token"} <= settings.keys():
        settings = {**unnamed(folder), **settings}
    inner.add_tokens(_special_tokens(folder, inner, settings))
    inner.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    return Tokenizer(
        inner,
        name=folder.name,
        vocab_size=vocab_size,
        bos=_token_text(settings.get("bos_token")),
        eos=_token_text(settings.get("eos_token")),
        cleans_up=_cleans_up(inner, settings),
    )


def _check_size(file: Path, inner: tokenizers.Tokenizer, vocab_size: int) -> None:
    added = inner.get_added_tokens_decoder()
    own = inner.get_vocab(with_added_tokens=False).values()
    largest = max((token_id for token_id in own if token_id not in added), default=-1)
    if largest >= vocab_size:
        raise FileError(
            f"{file}: has token id {largest}, but the model's vocab_size is {vocab_size}; "
            "this tokenizer belongs to another model"
        )


def _settings(file: Path) -> dict[str, object]:
    if not file.exists():
        return {}
    settings = parse_json(read_utf8(file), str(file), infinities=True)
    if not isinstance(settings, dict):
        raise FileError(f"{file}: expected a JSON object")
    return settings


def _special_tokens(folder: Path, inner: tokenizers.Tokenizer, settings: JsonObject) -> list[tokenizers.AddedToken]:
    """Tokens that the settings declare or name as special, and that tokenizer.json may hold for plain text or not know
    at all. In the order of transformers, which gives unknown ones the next free ids."""
    declared = settings.get("added_tokens_decoder") or {}
    if not isinstance(declared, dict) or not all(token_id.isdecimal() for token_id in declared):
        raise FileError(f"{folder / 'tokenizer_config.json'}: added_tokens_decoder must be tokens by their ids")
    known = {token.content: token for token in inner.get_added_tokens_decoder().values()}
    found = {}
    for _, value in sorted(declared.items(), key=lambda item: int(item[0])):
        if text := _token_text(value):
            found[text] = _added_token(text, value)
    for value in (value for name, value in settings.items() if name.endswith("_token")):
        if text := _token_text(value):
            token = found.get(text) or known.get(text) or _added_token(text, value)
            if not token.special:
                token = _added_token(text, {name: getattr(token, name) for name in FLAGS})
            found[text] = token
    listed = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or []
    for value in listed.values() if isinstance(listed, dict) else listed if isinstance(listed, list) else ():
        if (text := _token_text(value)) and text not in known:
            found.setdefault(text, _added_token(text, value))
    return list(found.values())


def _added_token(text: str, value: object) -> tokenizers.AddedToken:
    """An added token, special unless its settings say otherwise."""
    flags = {name: bool(value[name]) for name in FLAGS if name in value} if isinstance(value, dict) else {}
    special = value.get("special", True) is not False if isinstance(value, dict) else True
    return tokenizers.AddedToken(text, special=special, **{"normalized": not special, **flags})


def _token_text(token: object) -> str | None:
    """The text of a special token, which settings hold as text or as an object with ``content``."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _cleans_up(inner: tokenizers.Tokenizer, settings: JsonObject) -> bool:
    """Whether spaces before punctuation are removed: transformers does not do so for BPE, even if told to."""
    forced = settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output", False)
    asked = bool(settings.get("clean_up_tokenization_spaces", False))
    return asked and (bool(forced) or not isinstance(inner.model, tokenizers.models.BPE))


def _shown(text: str) -> str:
    """The beginning of a text, for one line."""
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}…"


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Context that puts ``where`` in front of any UserError about a text."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def end_of_text_id(model: Model) -> int:
    """The tokenizer's EOS, else the model's first. UserError if neither has one."""
    ids = _end_of_text_ids(model)
    if not ids:
        raise UserError(f"checkpoint {model.checkpoint.name} names no EOS token, which empty contexts need")
    return ids[0]


def prefix_id(model: Model) -> int:
    """The token before a text without context: the tokenizer's BOS, else the end of a text."""
    bos = text_codec(model).bos_token_id
    return end_of_text_id(model) if bos is None else int(bos)


def _end_of_text_ids(model: Model) -> list[int]:
    own = text_codec(model).eos_token_id
    return [*([] if own is None else [int(own)]), *map(int, model.eos_token_ids)]


def prompt_ids(model: Model, text: str) -> list[int]:
    """Token ids of a generation's prompt, with the special tokens that the tokenizer adds itself, unless it begins with
    BOS. A chat is read through the model's own template."""
    bos = text_codec(model).bos_token_id
    read = format_of(model).text(text)
    return encode_once(text_codec(model), read, None if bos is None else int(bos)) or [prefix_id(model)]


def text_ids(model: Model, text: str) -> list[int]:
    """Token ids of a text to score, with the special tokens that the tokenizer adds itself, unless it begins with the
    prefix.

    A model without a prefix can read it too: only texts without context need one.
    """
    knows_one = text_codec(model).bos_token_id is not None or _end_of_text_ids(model)
    return encode_once(text_codec(model), text, prefix_id(model) if knows_one else None)


def fitted_prompt_ids(model: Model, text: str, budget: int) -> tuple[list[int], bool]:
    """Token ids of a prompt, and whether its beginning was cut off to leave room for ``budget`` new tokens."""
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
    """Stop strings plus the text of the tokenizer's EOS, which a model may also spell out."""
    eos = text_codec(model).eos_token_id
    text = "" if eos is None else text_codec(model).decode_with_special([eos])
    return tuple(dict.fromkeys([*stop, *([text] if text else [])]))
