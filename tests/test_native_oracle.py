"""A second oracle: transformers' own nemotron_h on the same AR checkpoint gives the same logits and tokens.

Its time steps must be corrected first: it clamps them from below with time_step_min, which only initialises.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from checkpoint_files import base_names, write_config
from safetensors.torch import save_file
from tiny_models import tiny_config

from twotower_eval.engine.decoders import make_decoder
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.checkpoint import SINGLE_FILE, build, pair_slots
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.records import Prompt

RTOL = 3e-5  # of the largest logit
# Sizes for which both agree on what is meant: dropped groups are 0 here and -inf there, which matters only where all
# choice scores are negative, so the router biases are small.
CASES: dict[str, dict[str, Any]] = {
    "all kinds": {"hybrid_override_pattern": "ME*-M"},
    "one kv head, one group": {"hybrid_override_pattern": "M*M-", "num_key_value_heads": 1, "n_groups": 1},
    "router groups": {"hybrid_override_pattern": "E*ME", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    "limited time steps": {"hybrid_override_pattern": "MM*", "time_step_limit": [0.02, 0.1]},
    "unnormalised experts": {"hybrid_override_pattern": "E*M", "norm_topk_prob": False, "routed_scaling_factor": 0.7},
}
EXTRA = {"chunk_size": 16, "n_shared_experts": 1, "use_mamba_kernels": False, "eos_token_id": 2}


def write_base(folder: Path, **changes: Any) -> Path:
    """An AR checkpoint of random weights under ``backbone.*`` names."""
    write_config(folder, **EXTRA, **changes)
    model = build(tiny_config(**changes), "pair", torch.float32, ("cpu",))
    assert isinstance(model, TwoTower)
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, slot in pair_slots(model).items():
        tensor = torch.randn(slot.target.shape, generator=generator) * 0.2
        if name.endswith("norm.weight") or name.endswith("norm_f.weight"):
            tensor += 1.0
        if name.endswith("A_log"):
            tensor += 1.0
        if name.endswith("e_score_correction_bias"):
            tensor *= 0.1
        tensors[name] = tensor
    save_file(base_names(tensors), str(folder / SINGLE_FILE), {"format": "pt"})
    return folder


def native(folder: Path) -> Any:
    """transformers' model, its time steps corrected."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    data = json.loads((folder / "config.json").read_text())
    low, high = data.get("time_step_limit") or (0.0, float("inf"))
    for layer in model.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (low, float("inf") if isinstance(high, dict) else high)
    return model


def ids(length: int) -> torch.Tensor:
    return torch.randint(4, 40, (2, length), generator=torch.Generator().manual_seed(length))


@pytest.mark.parametrize("case", CASES)
def test_logits(case: str, tmp_path: Path) -> None:
    """Lengths below, at and above a chunk."""
    folder = write_base(tmp_path, **CASES[case])
    ours, theirs = load_model(folder), native(folder)
    with torch.inference_mode():
        for length in (1, 2, 16, 41):
            wanted = theirs(input_ids=ids(length), use_cache=False).logits
            difference = (ours.context_logits(ids(length)) - wanted).abs().max()
            assert float(difference) < RTOL * float(wanted.abs().max())


@pytest.mark.parametrize("case", [case for case in CASES if "limited" not in case])
def test_tokens(case: str, tmp_path: Path) -> None:
    """Greedy, cached on both sides. (It clamps time steps in prefill only, so not with a limit.)"""
    folder = write_base(tmp_path, **CASES[case])
    rows = ids(6)
    out = native(folder).generate(
        rows,
        attention_mask=torch.ones_like(rows),
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    decoder = make_decoder(load_model(folder), "autoregressive")
    prompts = [Prompt(id=str(i), token_ids=tuple(row)) for i, row in enumerate(rows.tolist())]
    generations = decoder.generate(prompts, max_new_tokens=24)
    assert [list(g.token_ids) for g in generations] == out[:, 6:].tolist()


def test_a_checkpoint_that_transformers_wrote(tmp_path: Path) -> None:
    """save_pretrained spells the layers out and writes infinity as an object; we read that too."""
    source = write_base(tmp_path / "ours", **CASES["all kinds"])
    native(source).save_pretrained(tmp_path / "theirs")
    assert "hybrid_override_pattern" not in json.loads((tmp_path / "theirs" / "config.json").read_text())
    ours, theirs = load_model(source), load_model(tmp_path / "theirs")
    assert torch.equal(theirs.context_logits(ids(9)), ours.context_logits(ids(9)))
    assert theirs.context_digest == ours.context_digest


def test_the_transformers_family_leaves_it_to_ours(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="read by this project's own family"):
        load_model(write_base(tmp_path, **CASES["all kinds"]), family="transformers")
