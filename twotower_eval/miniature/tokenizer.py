"""The miniature's tokenizer: one token per character, in plain Python and as Hugging Face tokenizer files.

Both forms give the same ids for every text (tested), so that training encodes with a dictionary look-up and
evaluation goes through the files beside the weights like any other checkpoint. Nothing is added or stripped:
no BOS in front, no clean-up of spaces on the way back.
"""

import json
import re
import string
from collections.abc import Iterable
from pathlib import Path

PAD, BOS, EOS, MASK, UNKNOWN = SPECIAL_TOKENS = ("<pad>", "<s>", "</s>", "<mask>", "<unk>")
CHARACTERS = "\n " + string.digits + string.ascii_lowercase + string.ascii_uppercase + "!\"#$%&'()*+,-./:;<=>?[]_{|}"
VOCABULARY = (*SPECIAL_TOKENS, *CHARACTERS)
PAD_ID, BOS_ID, EOS_ID, MASK_ID, UNKNOWN_ID = range(len(SPECIAL_TOKENS))

_ID_OF_TOKEN = {token: index for index, token in enumerate(VOCABULARY)}
_TOKEN = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)) + r"|[\s\S]")


def encode(text: str) -> list[int]:
    """The ids of a text: special tokens written out ("</s>") become their id, other characters theirs or unknown."""
    return [_ID_OF_TOKEN.get(token, UNKNOWN_ID) for token in _TOKEN.findall(text)]


def decode(ids: Iterable[int]) -> str:
    """The text of ids, special tokens written out. An id outside the vocabulary is an IndexError."""
    return "".join(VOCABULARY[index] for index in ids)


def write_tokenizer(folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json, which `tokenizers` and `transformers.AutoTokenizer` load."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("tokenizer.json", _tokenizer_json()), ("tokenizer_config.json", _tokenizer_config())):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _tokenizer_json() -> dict[str, object]:
    """Written by hand rather than by the library, so that the bytes do not depend on the library's version."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": token, **plain} for index, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Split", "pattern": {"Regex": r"[\s\S]"}, "behavior": "Isolated", "invert": False},
        "post_processor": None,
        "decoder": {"type": "Fuse"},
        "model": {"type": "WordLevel", "vocab": _ID_OF_TOKEN, "unk_token": UNKNOWN},
    }


def _tokenizer_config() -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "mask_token": MASK,
        "unk_token": UNKNOWN,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1_000_000,
    }
