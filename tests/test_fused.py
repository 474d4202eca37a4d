"""Our own kernels for GPUs, run on a CPU by Triton's interpreter: each by its proof, all of them by golden tokens."""

from __future__ import annotations

import dataclasses
import os

import pytest
import torch
from golden_files import SHIPPED, described
from safetensors.torch import load_file

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined
pytest.importorskip("triton", reason="Triton is not installed here")

from twotower_eval.decoders import make_decoder
from twotower_eval.models import load_model
from twotower_eval.models.graphs import StepGraphs
from twotower_eval.ops import attention, kernels, mamba, moe, norm, product
from twotower_eval.records import Prompt

CPU = torch.device("cpu")


def load_ids(folder, name):
    """Token ids of a golden prompt of one row."""
    return load_file(folder / "golden.safetensors")[f"{name}.ids"][0].tolist()


PLACES = {
    "ADD_NORM": norm,
    "GATED_NORM": norm,
    "ROW_PRODUCT": product,
    "ROUTER": moe,
    "FUSED_EXPERTS": moe,
    "SCAN": mamba,
    "FEW_QUERIES": attention,
}


def here(name: str) -> kernels.Kernel:
    """The registered kernel, for a CPU."""
    return dataclasses.replace(getattr(PLACES[name], name), device_types=("cpu",), _proofs={})


@pytest.mark.parametrize("name", sorted(PLACES))
def test_a_kernel_of_ours_proves_itself(name: str) -> None:
    proof = here(name).proof(CPU, torch.float32)
    assert proof.function is not None, proof.reason


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """All of them serve on this CPU; how often each is called."""
    calls = dict.fromkeys(PLACES, 0)

    def counted(name: str, function):
        def call(*args, **options):
            calls[name] += 1
            return function(*args, **options)

        return call

    for name, place in PLACES.items():
        kernel = here(name)
        monkeypatch.setattr(
            place, name, dataclasses.replace(kernel, load=lambda k=kernel, n=name: counted(n, k.load()))
        )
    monkeypatch.setattr(kernels, "ON_ANY_DEVICE", True)
    return calls


@pytest.mark.parametrize("fixed_places", [False, True])
def test_whole_models_give_golden_tokens(everywhere: dict[str, int], fixed_places: bool) -> None:
    folder = SHIPPED / "public"
    model = load_model(folder)
    if fixed_places:
        model.graphs = model.context_tower.graphs = StepGraphs()
    facts = described(folder)
    [name] = [name for name, prompt in facts["prompts"].items() if len(prompt["ar_tokens"]) == 1][:1]
    prompt = facts["prompts"][name]
    ids = load_ids(folder, name)
    ask = [Prompt(id=name, token_ids=tuple(ids))]
    [ours] = make_decoder(model, "autoregressive").generate(ask, max_new_tokens=8)
    assert list(ours.token_ids) == prompt["ar_tokens"][0][:8]
    case = next(iter(prompt["diffusion"].values()))
    params = {key: case[key] for key in ("block_size", "steps_per_block")}
    decoder = make_decoder(model, "block_diffusion", threshold=case["confidence_threshold"], **params)
    [ours] = decoder.generate(ask, max_new_tokens=case["block_size"])
    assert list(ours.token_ids) == case["tokens"][0][: case["block_size"]]
    # Heads of the golden checkpoint are narrower than a tile of the attention kernel.
    assert {name for name, number in everywhere.items() if not number} == {"FEW_QUERIES"}
