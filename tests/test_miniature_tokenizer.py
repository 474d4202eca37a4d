"""The miniature's tokenizer: the plain functions and the Hugging Face files give the same ids and texts."""

from itertools import islice

from twotower_eval.miniature.corpus import documents
from twotower_eval.miniature.export import (
    CHARACTERS,
    SPECIAL_TOKENS,
    VOCABULARY,
    decode,
    encode,
    write_tokenizer,
)

AWKWARD_TEXTS = [
    "  two  spaces , a comma , it 's n't . \n\n and\nlines \n",
    "<s>marks</s> inside<mask> the text<pad>",
    "outside: é ß \t 日本 ~",
    "",
]


def test_vocabulary_has_no_double_and_fixed_special_ids():
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 96
    assert encode("".join(SPECIAL_TOKENS)) == [0, 1, 2, 3, 4]
    assert SPECIAL_TOKENS[:4] == ("<pad>", "<s>", "</s>", "<mask>")


def test_every_character_survives_encoding():
    assert decode(encode(CHARACTERS)) == CHARACTERS
    assert len(encode(CHARACTERS)) == len(CHARACTERS)


def test_hugging_face_tokenizers_agree_with_encode_and_decode(tmp_path):
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    write_tokenizer(tmp_path)
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    auto = AutoTokenizer.from_pretrained(str(tmp_path))
    texts = AWKWARD_TEXTS + [d.prompt + d.answer + "</s>" for d in islice(documents(9), 200)]
    for text in texts:
        ids = encode(text)
        assert fast.encode(text).ids == ids
        assert auto.encode(text) == ids == auto.encode(text, add_special_tokens=False)
        assert decode(ids) == fast.decode(ids, skip_special_tokens=False) == auto.decode(ids)
        if set(text) <= set(CHARACTERS):
            assert decode(ids) == text
    assert (auto.pad_token_id, auto.bos_token_id, auto.eos_token_id, auto.mask_token_id) == (0, 1, 2, 3)
    assert len(auto) == len(VOCABULARY)
    assert auto.decode(encode("a b</s>"), skip_special_tokens=True) == "a b"
