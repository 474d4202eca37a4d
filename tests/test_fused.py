"""Our own kernels for GPUs, run on a CPU by Triton's interpreter: each by its proof, all of them in a whole model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

if torch.cuda.is_available():
    pytest.skip("kernels prove themselves on the GPU that is here", allow_module_level=True)
pytest.importorskip("triton", reason="Triton is not installed here")

from twotower_eval.engine.models import load_model
from twotower_eval.engine.models.graphs import StepGraphs
from twotower_eval.engine.ops import attention, kernels, mamba, moe, norm, product
from twotower_eval.resources import data_path

CPU = torch.device("cpu")
PLACES = {
    "ADD_NORM": norm,
    "GATED_NORM": norm,
    "ROW_PRODUCT": product,
    "ROUTER": moe,
    "FUSED_EXPERTS": moe,
    "SCAN": mamba,
    "FEW_QUERIES": attention,
}


def here(name):
    """The registered kernel, for a CPU."""
    return dataclasses.replace(getattr(PLACES[name], name), device_types=("cpu",), _proofs={})


@pytest.mark.parametrize("name", sorted(PLACES))
def test_a_kernel_of_ours_proves_itself(name):
    proof = here(name).proof(CPU, torch.float32)
    assert proof.function is not None, proof.reason


def test_a_norm_that_finds_the_shift_where_the_gain_lies_is_refused():
    """A first version did, passed a proof whose tensors all lay alike, and gave a batch the wrong logits."""

    def wrong(x, mixed, gate, weight, eps, shift, gain, before):
        shift = None if shift is None else shift.as_strided(shift.shape, gain.stride())
        return norm.add_norm_reference(x, mixed, gate, weight, eps, shift, gain, before)

    kernel = dataclasses.replace(here("ADD_NORM"), load=lambda: wrong)
    assert "differs from the reference" in kernel.proof(CPU, torch.float32).reason


@pytest.fixture
def everywhere(monkeypatch):
    """All of them serve on this CPU without a proof; how often each is called."""
    calls = dict.fromkeys(PLACES, 0)

    def counted(name):
        function = getattr(PLACES[name], name).load()

        def call(*args, **options):
            calls[name] += 1
            return function(*args, **options)

        return kernels.Proof(function=call, reason="a test")

    for name, place in PLACES.items():
        proofs = {(CPU, torch.float32): counted(name)}
        monkeypatch.setattr(place, name, dataclasses.replace(here(name), _proofs=proofs))
    monkeypatch.setattr(kernels, "ON_ANY_DEVICE", True)
    monkeypatch.setattr(moe, "serves_joined", lambda *_: False)  # a way of CPUs
    return calls


def test_what_has_to_be_differentiated_is_left_to_torch(everywhere):
    x_BSH, weight_H = torch.randn(2, 3, 8), torch.randn(8)
    gate_B1H = torch.randn(2, 1, 8, requires_grad=True)
    given = (x_BSH, x_BSH, gate_B1H, weight_H, 1e-5, None, None, False)
    assert norm.add_norm(*given)[0].requires_grad
    assert not everywhere["ADD_NORM"]
    with torch.no_grad():
        norm.add_norm(*given)
    assert everywhere["ADD_NORM"] == 1


def steps(model, prompts) -> list[Tensor]:
    """Logits behind an AR step of one row and of two, of a denoise step of unequal rows, and behind its block."""
    found = []
    with torch.inference_mode():
        one, two = prompts
        context = model.extend(one, torch.tensor([[7]]))
        found.append(model.next_logits(context))
        context = model.extend(two, torch.tensor([[7], [9]]))
        found.append(model.next_logits(context))
        block_BK = torch.arange(10, 26).view(2, 8)
        found.append(model.denoise(block_BK, context, [0.25, 0.875]))
        found.append(model.next_logits(model.extend(context, block_BK)))
    return found


@pytest.mark.parametrize("fixed_places", [False, True])
def test_steps_of_a_whole_model_are_the_same(request, fixed_places):
    """Rows of unequal lengths at unequal mask fractions: what lies apart in memory must be found."""
    model = load_model(data_path("miniature", "pair"))
    ids_BS = torch.arange(30, 54).view(2, 12)
    with torch.inference_mode():
        prompts = model.prefill(ids_BS[:1]), model.prefill(ids_BS, [12, 9])
    plain = steps(model, prompts)
    calls = request.getfixturevalue("everywhere")
    if fixed_places:
        model.graphs = model.context_tower.graphs = StepGraphs()
    for ours, theirs in zip(steps(model, prompts), plain, strict=True):
        assert kernels.relative_error(ours, theirs) < 1e-4
    assert all(calls.values())
