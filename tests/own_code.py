"""A checkpoint that brings its own classes: a causal language model that transformers does not know."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hf_models import READING_VOCAB
from safetensors.torch import save_file
from transformers import dynamic_module_utils

from twotower_eval.miniature.export import EOS_ID, write_tokenizer

CONFIGURATION = """
from transformers import PretrainedConfig


class OwnConfig(PretrainedConfig):
    model_type = "own_mean"

    def __init__(self, width=16, vocab_size=8, **kwargs):
        self.width, self.vocab_size, self.num_hidden_layers = width, vocab_size, 1
        super().__init__(**kwargs)
"""
MODELLING = """
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from .configuration_own import OwnConfig
from .parts_own import running_mean


class OwnForCausalLM(PreTrainedModel):
    config_class = OwnConfig
    all_tied_weights_keys = {}

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids=None, attention_mask=None, **kwargs):
        states = running_mean(self.embed(input_ids), attention_mask)
        return CausalLMOutput(logits=self.head(torch.tanh(states)))
"""
PARTS = """
import torch


def running_mean(states_BSH, mask_BS):
    kept = torch.ones(states_BSH.shape[:2]) if mask_BS is None else mask_BS
    kept = kept.to(states_BSH)[..., None]
    return (states_BSH * kept).cumsum(1) / kept.cumsum(1).clamp(min=1) + states_BSH
"""
CODE = {"configuration_own.py": CONFIGURATION, "modeling_own.py": MODELLING, "parts_own.py": PARTS}


def use_modules(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Have transformers copy such code into this folder. A process has one such folder: what other tests imported from
    theirs is forgotten, as its package would be looked into for ours."""
    package = "transformers_modules"
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        del sys.modules[name]
    monkeypatch.setattr(sys, "path", [one for one in sys.path if not (Path(one) / package).is_dir()])
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder))


def save_own(folder: Path) -> Path:
    """Random weights from a fixed seed, the miniature's tokenizer, and the code."""
    folder.mkdir(parents=True)
    classes = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    config = {"model_type": "own_mean", "architectures": ["OwnForCausalLM"], "auto_map": classes, "width": 16}
    config |= {"vocab_size": READING_VOCAB, "eos_token_id": EOS_ID, "max_position_embeddings": 512}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    for name, code in {**CODE, "unused.py": "raise RuntimeError"}.items():
        (folder / name).write_text(code, encoding="utf-8")
    torch.manual_seed(3)
    weights = {"embed.weight": torch.randn(READING_VOCAB, 16), "head.weight": torch.randn(READING_VOCAB, 16)}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder)
    return folder
