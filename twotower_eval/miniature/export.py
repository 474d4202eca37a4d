"""The pair in the released checkpoint layout, with its tokenizer of one token per character."""

from __future__ import annotations

import json
import re
import shutil
import string
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from twotower_eval.engine.models.checkpoint import FLOAT32_PARAMETERS, pair_slots
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.miniature.recipes import Recipe
from twotower_eval.store.journal import TRAINING_LOG

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


def config_json(recipe: Recipe) -> dict[str, object]:
    """The config.json of the recipe's pair, in the released layout."""
    return {
        "_name_or_path": "miniature",
        "architectures": ["NemotronHTwoTowerForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": len(VOCABULARY),
        "layer_norm_epsilon": 1e-5,
        "num_hidden_layers": len(str(recipe["model"]["hybrid_override_pattern"])),
        "pad_token_id": PAD_ID,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "mask_token_id": MASK_ID,
        "mlp_hidden_act": "relu2",
        "mamba_hidden_act": "silu",
        "norm_topk_prob": True,
        "use_conv_bias": True,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        **recipe["model"],
    }


def export_pair(model: TwoTower, recipe: Recipe, folder: Path) -> Path:
    """Weights rounded to bfloat16 (routers float32), config and tokenizer into ``folder/pair``; that folder."""
    pair = folder / "pair"
    pair.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, slot in pair_slots(model).items():
        dtype = torch.float32 if name.endswith(FLOAT32_PARAMETERS) else torch.bfloat16
        tensors[name] = slot.target.detach().cpu().to(dtype).contiguous()
    save_file(tensors, pair / "model.safetensors", metadata={"format": "pt"})
    (pair / "config.json").write_text(json.dumps(config_json(recipe), indent=1) + "\n", encoding="utf-8")
    write_tokenizer(pair)
    if (folder / TRAINING_LOG).exists():
        shutil.copyfile(folder / TRAINING_LOG, pair / TRAINING_LOG)
    return pair
