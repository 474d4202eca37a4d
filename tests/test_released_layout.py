"""The released 30B model's names and shapes, without its memory; and 2 GiB in shards, loaded within its size."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_files import write_shards
from tiny_models import SIZES

from twotower_eval.engine.models.checkpoint import build, context_slots, pair_slots
from twotower_eval.engine.models.config import parse_config
from twotower_eval.engine.models.twotower import TwoTower
from twotower_eval.resources import data_path

PROC_STATUS = Path("/proc/self/status")
LAYERS = {"M": 23, "E": 23, "*": 6}

# Names and shapes as the released checkpoint's description has them, written out for its sizes: hidden 2688,
# vocabulary 131072, Mamba 64 heads x 64 with 8 groups x 128 states, attention 32/2 heads x 128, 128 experts.
TOP = {
    "context_lm_head.weight": (131072, 2688),
    "lm_head.weight": (131072, 2688),
    "t_embedder.mlp.0.weight": (2688, 256),
    "t_embedder.mlp.0.bias": (2688,),
    "t_embedder.mlp.2.weight": (2688, 2688),
    "t_embedder.mlp.2.bias": (2688,),
    "t_block.1.weight": (8064, 2688),
    "t_block.1.bias": (8064,),
}
EXPERTS = {
    f"experts.{e}.{way}_proj.weight": shape
    for e in range(128)
    for way, shape in (("up", (1856, 2688)), ("down", (2688, 1856)))
}
MIXERS = {
    "M": {
        "A_log": (64,),
        "D": (64,),
        "dt_bias": (64,),
        "conv1d.weight": (6144, 1, 4),
        "conv1d.bias": (6144,),
        "in_proj.weight": (10304, 2688),
        "norm.weight": (4096,),
        "out_proj.weight": (2688, 4096),
    },
    "*": {
        "q_proj.weight": (4096, 2688),
        "k_proj.weight": (256, 2688),
        "v_proj.weight": (256, 2688),
        "o_proj.weight": (2688, 4096),
    },
    "E": {
        "gate.weight": (128, 2688),
        "gate.e_score_correction_bias": (128,),
        **EXPERTS,
        "shared_experts.up_proj.weight": (3712, 2688),
        "shared_experts.down_proj.weight": (2688, 3712),
    },
}


def released_tower(prefix: str, pattern: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one tower."""
    listed: dict[str, tuple[int, ...]] = {
        f"{prefix}embeddings.weight": (131072, 2688),
        f"{prefix}norm_f.weight": (2688,),
    }
    for i, letter in enumerate(pattern):
        listed[f"{prefix}layers.{i}.norm.weight"] = (2688,)
        listed.update({f"{prefix}layers.{i}.mixer.{name}": shape for name, shape in MIXERS[letter].items()})
    return listed


def test_released_config_gives_the_released_names_and_shapes() -> None:
    """On the meta device: 63 billion parameters and not one byte of them."""
    data = json.loads(data_path("tasks", "configs", "nemotron-labs-twotower-30b-a3b.config.json").read_text())
    config = parse_config(data)
    pattern = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
    assert {letter: config.pattern.count(letter) for letter in LAYERS} == LAYERS
    model = build(config, "pair", torch.bfloat16, ("meta",))
    assert isinstance(model, TwoTower)
    wanted = {**TOP, **{f"scale_shift_tables.{i}": (3, 2688) for i in range(52)}}
    wanted |= released_tower("context_tower.", pattern) | released_tower("denoiser_tower.", pattern)
    slots = pair_slots(model)
    assert {name: tuple(slot.target.shape) for name, slot in slots.items()} == wanted
    assert all(slot.target.is_meta for slot in slots.values())
    num_parameters = sum(slot.target.numel() for slot in slots.values())
    assert 62e9 < num_parameters < 64e9
    assert config.mask_token_id == 3
    base = context_slots(model.context_tower, prefix="backbone.", head="lm_head.weight")
    wanted_base = released_tower("backbone.", pattern) | {"lm_head.weight": (131072, 2688)}
    assert {name: tuple(slot.target.shape) for name, slot in base.items()} == wanted_base


MEASURE = """
import sys
import torch
from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.checkpoint import pair_slots

def kilobytes(field):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(field))

torch.empty(0)
before = kilobytes("VmRSS:")
model = load_model(sys.argv[1], dtype="bfloat16")
print((kilobytes("VmHWM:") - before) * 1024, sum(slot.target.nbytes for slot in pair_slots(model).values()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PROC_STATUS.exists(), reason="peak memory of a process is read from /proc, which Linux has")
def test_two_gibibytes_in_shards_load_within_their_size(tmp_path: Path) -> None:
    """Peak host memory of a fresh process, beyond its imports, stays below 1.2 times the checkpoint.

    Read from the process's own high-water mark: resource.ru_maxrss would start at that of its parent.
    """
    sizes = {"hidden_size": 1024, "vocab_size": 65536, "intermediate_size": 11264, "mamba_num_heads": 16}
    experts = {"n_routed_experts": 96, "moe_intermediate_size": 1024, "moe_shared_expert_intermediate_size": 1024}
    config = {**SIZES, **sizes, **experts, "hybrid_override_pattern": "ME*-ME"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build(parse_config(config), "pair", torch.bfloat16, ("meta",))
    assert isinstance(model, TwoTower)
    shapes = {name: tuple(slot.target.shape) for name, slot in pair_slots(model).items()}
    pool = torch.randn(1 << 27).bfloat16()  # many tensors share one pool: only their files are large
    tensors = {name: pool[: torch.Size(shape).numel()].view(shape) for name, shape in shapes.items()}
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert num_bytes >= 2 << 30
    write_shards(tmp_path, tensors, num_shards=5)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], capture_output=True, text=True, check=False, timeout=600
    )
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert done.returncode == 0, done.stderr
    peak_bytes, loaded_bytes = map(int, done.stdout.split())
    assert loaded_bytes >= 2 << 30
    assert peak_bytes < 1.2 * num_bytes, f"peak {peak_bytes / num_bytes:.3f} times the checkpoint"
