"""Tiny Llamas with real tokenizers: random ones, and such that say one given list of tokens."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

SPECIAL = ("<s>", "</s>", "<|im_end|>", "<|x|>")


def byte_tokenizer(*, adds_bos: bool = False, special: Sequence[str] = SPECIAL) -> Tokenizer:
    """One token a byte, behind the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    if adds_bos:
        tokenizer.post_processor = _adding_first(tokenizer, special[0])
    return tokenizer


def piece_tokenizer(pieces: Sequence[str], *, adds_bos: bool = False) -> Tokenizer:
    """Words of a metaspace vocabulary, as Llama 2 has them: blanks are written as bars, the first one is taken off."""
    vocab = {token: i for i, token in enumerate([*SPECIAL, "<unk>", *pieces])}
    vocab |= {letter: len(vocab) + i for i, letter in enumerate(sorted({*"".join(pieces)} - vocab.keys()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([*SPECIAL, "<unk>"])
    if adds_bos:
        tokenizer.post_processor = _adding_first(tokenizer, SPECIAL[0])
    return tokenizer


def _adding_first(tokenizer: Tokenizer, token: str) -> Any:
    ids = [(token, tokenizer.token_to_id(token))]
    return processors.TemplateProcessing(single=f"{token} $A", pair=f"{token} $A $B:1", special_tokens=ids)


def beyond(tokenizer: Tokenizer, token: str) -> Tokenizer:
    """The same with one more special token, whose id is the vocabulary's size."""
    tokenizer.add_special_tokens([AddedToken(token, special=True)])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, **settings: Any) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<s>", **settings}
    kept = {name: value for name, value in named.items() if value is not None}
    text = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", **kept})
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def save_random(folder: Path, vocab_size: int, generation: dict[str, Any] | None = None, **config: Any) -> Path:
    """Random weights from a fixed seed."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(7)
    named = {"bos_token_id": 0, "eos_token_id": 1, **config}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=vocab_size, initializer_range=0.4, **sizes, **named)
    )
    if generation is not None:
        model.generation_config = transformers.GenerationConfig(**generation)
    model.save_pretrained(folder)
    return folder


def save_saying(folder: Path, vocab_size: int, said: Sequence[int], eos_token_id: Any = 1) -> Path:
    """A model that answers every prompt of one token with ``said``, then with its last token again and again.

    Its positions are its script: attention does nothing, and each position's own embedding names the next token.
    """
    width = len(said) + 1
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocab_size,
            n_embd=vocab_size,
            n_positions=64,
            n_layer=1,
            n_head=1,
            n_inner=2,
            bos_token_id=0,
            eos_token_id=eos_token_id,
            tie_word_embeddings=False,
        )
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and name.endswith("weight") else 0.0)
        model.lm_head.weight.copy_(torch.eye(vocab_size))
        for position in range(64):
            model.transformer.wpe.weight[position, said[min(position, width - 2)]] = 1.0
    model.save_pretrained(folder)
    return folder
