"""Foreign kernels: used where they agree with our reference, refused with a reason where they do not."""

import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from twotower_eval.engine.ops import kernels, mamba, moe, ssd
from twotower_eval.store import environment

CPU = torch.device("cpu")


def correct_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    """As mamba-ssm's signature has it, by our own reference."""
    y, after = ssd.ssd_reference(x[:, None], dt[:, None, :, 0], A[:, 0, 0], B[:, None], C[:, None], state.clone())
    state.copy_(after)
    return y[:, 0]


def correct_chunk_scan(x, dt, A, B, C, chunk_size, initial_states=None, dt_softplus=False, return_final_states=False):
    assert return_final_states
    assert not dt_softplus
    return ssd.ssd_reference(x, dt, A, B, C, initial_states)


def correct_convolution(x, weight, bias, initial_states=None, return_final_states=False, activation=None):
    assert activation == "silu"
    assert x.stride(1) == initial_states.stride(1) == 1
    out = functional.conv1d(torch.cat([initial_states, x], dim=2), weight[:, None], bias, groups=x.shape[1])
    return functional.silu(out)


CORRECT = {
    "mamba-ssm state update": correct_state_update,
    "mamba-ssm chunk scan": correct_chunk_scan,
    "causal-conv1d": correct_convolution,
    "torch grouped_mm": functional.grouped_mm,
}


def on_cpu(name, function):
    """The registered kernel, its proof as it is, for a function that runs here."""
    known = kernels.KERNELS[name]
    return kernels.Kernel(name=name, load=lambda: function, pairs=known.pairs, device_types=("cpu",))


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", sorted(CORRECT))
def test_a_kernel_that_computes_the_same_is_used(name, precision):
    proof = on_cpu(name, CORRECT[name]).proof(CPU, precision)
    assert proof.function is CORRECT[name], proof.reason


def wrong_in_an_unfinished_chunk(*args, **options):
    """Seen in public: right for whole chunks, wrong for what is shorter than a chunk."""
    y, state = correct_chunk_scan(*args, **options)
    return (y if args[0].shape[1] % 64 == 0 else y * 1.05), state


def forgets_the_seed(*args, initial_states=None, **options):
    return correct_chunk_scan(*args, initial_states=torch.zeros_like(initial_states), **options)


def gives_nan(*args, **options):
    y, state = correct_chunk_scan(*args, **options)
    return y * torch.nan, state


def breaks(*args, **options):
    raise RuntimeError("CUDA error: invalid\nconfiguration")


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (wrong_in_an_unfinished_chunk, "differs from the reference by more than"),
        (forgets_the_seed, "differs from the reference by more than"),
        (gives_nan, "differs from the reference by more than"),
        (breaks, "RuntimeError: CUDA error: invalid configuration"),
    ],
)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_kernel_that_does_not_is_refused_with_a_reason(function, words, precision):
    proof = on_cpu("mamba-ssm chunk scan", function).proof(CPU, precision)
    assert proof.function is None
    assert words in proof.reason


def test_a_grouped_product_that_mixes_up_its_groups_is_refused():
    def shifted(rows, groups, offs):
        return functional.grouped_mm(rows, groups.roll(1, 0), offs=offs)

    assert on_cpu("torch grouped_mm", shifted).on(CPU, torch.bfloat16) is None


def test_proofs_are_made_once(monkeypatch):
    calls = []
    known = kernels.KERNELS["causal-conv1d"]

    def load():
        calls.append("load")
        return correct_convolution

    kernel = kernels.Kernel(name="k", load=load, pairs=known.pairs, device_types=("cpu",))
    assert kernel.on(CPU, torch.float32) is kernel.on(CPU, torch.float32)
    assert calls == ["load"]


def test_kernels_of_gpus_are_not_asked_on_a_cpu():
    for kernel in kernels.KERNELS.values():
        assert kernel.proof(CPU, torch.float32).reason == "not for cpu"
    assert kernels.describe(["cpu"], "float32") is None


def test_the_manifest_tells_which_are_active(monkeypatch):
    """A device type of its own stands for a GPU: descriptions ask every kernel, installed or not."""
    monkeypatch.setattr(kernels, "KERNELS", {
        "good": kernels.Kernel(name="good", load=lambda: correct_convolution, device_types=("meta",),
                               pairs=lambda *_: [(torch.ones(2), torch.ones(2))]),
        "absent": kernels.Kernel(name="absent", load=lambda: absent(), device_types=("meta",), pairs=lambda *_: []),
    })  # fmt: skip

    def absent():
        raise ModuleNotFoundError("no such package", name="absent")

    told = environment._active_kernels(["meta"], "bfloat16")
    assert told == {
        "good": "active: agrees with the reference to 1e-02",
        "absent": "refused: not installed: no module absent",
    }


def test_kernels_are_loaded_from_where_the_packages_have_them(monkeypatch):
    names = {
        "causal_conv1d": ("causal_conv1d_fn", "causal-conv1d"),
        "mamba_ssm.ops.triton.selective_state_update": ("selective_state_update", "mamba-ssm state update"),
        "mamba_ssm.ops.triton.ssd_combined": ("mamba_chunk_scan_combined", "mamba-ssm chunk scan"),
    }
    for package in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton", *names):
        monkeypatch.setitem(sys.modules, package, types.ModuleType(package))
    for package, (attribute, name) in names.items():
        monkeypatch.setattr(sys.modules[package], attribute, CORRECT[name], raising=False)
        assert kernels.KERNELS[name].load() is CORRECT[name]


@settings(deadline=None, max_examples=40)
@given(
    num_rows=st.integers(1, 20), num_experts=st.integers(3, 12), per_token=st.integers(1, 3), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_paths_without_a_wait_for_the_device_equal_the_reference(num_rows, num_experts, per_token, seed, dtype):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, 16, generator=generator).to(dtype)
    up = (torch.randn(num_experts, 24, 16, generator=generator) / 4).to(dtype)
    down = (torch.randn(num_experts, 16, 24, generator=generator) / 4).to(dtype)
    scores = torch.rand(num_rows, num_experts, generator=generator)
    weights, chosen = scores.topk(per_token, dim=-1)
    expected = moe.experts_reference(x, chosen, weights, up, down)
    limit = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
    grouped = moe.experts_grouped(x, chosen, weights, up, down, functional.grouped_mm)
    torch.testing.assert_close(grouped, expected, **limit)
    torch.testing.assert_close(moe.experts_padded(x, chosen, weights, up, down), expected, **limit)


def test_gradients_go_through_our_own_code():
    weight = torch.nn.Parameter(torch.ones(2))
    assert not kernels.without_gradients(torch.ones(1), weight)
    with torch.no_grad():
        assert kernels.without_gradients(weight)


def test_wrappers_equal_the_reference_when_called_by_themselves():
    u, state = torch.randn(2, 5, 6), torch.randn(2, 6, 4)
    weight, bias = torch.randn(6, 4), torch.randn(6)
    ours = mamba.conv_by_kernel(u, state, weight, bias, correct_convolution)
    torch.testing.assert_close(ours, mamba.causal_conv_reference(u, state, weight, bias))


def test_paths_for_gpus_ask_the_device_nothing():
    x, up, down = (
        torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((7, 16), (5, 24, 16), (5, 16, 24))
    )
    chosen = torch.empty(7, 2, dtype=torch.int64, device="meta")
    weights = torch.empty(7, 2, device="meta")
    assert moe.experts_padded(x, chosen, weights, up, down).shape == (7, 16)
    assert moe.experts_grouped(x, chosen, weights, up, down, functional.grouped_mm).shape == (7, 16)
