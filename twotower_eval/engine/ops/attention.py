"""Grouped-query attention without positional encoding. Shape letters: see ops/__init__."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from twotower_eval.engine.ops import kernels

# What the kernel for few queries serves: new positions of a row and of all rows, keys, and pairs of a new position and
# a key, for each of which it keeps 1/128 of all heads' sums.
KERNEL_MAX_NEW, KERNEL_MAX_ROWS, KERNEL_MAX_SLOTS, KERNEL_MAX_PAIRS = 64, 512, 1 << 15, 1 << 20
KERNEL_DIMS = (16, 32, 64, 128)  # of a head
# Of torch's own for GPUs, without cuDNN's, which plans anew for every number of keys. Seen on an H200 without CUDA
# graphs: 54 ms for an AR step beside 15 ms for a denoise step, whose keys do not grow; without it 24 ms beside 27.
GPU_BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attention(
    q_BQSD: Tensor, k_BJTD: Tensor, v_BJTD: Tensor, mask: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    """Scaled dot-product attention, (B, Q, S, D). Query head q reads key-value head ``q // (Q / J)``.

    ``mask`` is boolean, True where a query may look, broadcastable to (B, 1, S, T); every query must see a key.
    """
    grouped = q_BQSD.shape[1] != k_BJTD.shape[1]
    if q_BQSD.is_cuda:
        if grouped and mask is not None:  # else torch materialises all scores
            repeats, grouped = q_BQSD.shape[1] // k_BJTD.shape[1], False
            k_BJTD, v_BJTD = (t.repeat_interleave(repeats, dim=1) for t in (k_BJTD, v_BJTD))
        with sdpa_kernel(GPU_BACKENDS):
            return functional.scaled_dot_product_attention(
                q_BQSD, k_BJTD, v_BJTD, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped
            )
    return functional.scaled_dot_product_attention(
        q_BQSD, k_BJTD, v_BJTD, attn_mask=mask, is_causal=is_causal, enable_gqa=grouped
    )


def attention_reference(
    q_BQSD: Tensor, k_BJTD: Tensor, v_BJTD: Tensor, mask: Tensor | None = None, *, is_causal: bool = False
) -> Tensor:
    """Softmax written out in float32, heads repeated."""
    repeats = q_BQSD.shape[1] // k_BJTD.shape[1]
    k, v = k_BJTD.repeat_interleave(repeats, dim=1), v_BJTD.repeat_interleave(repeats, dim=1)
    scores_BQST = q_BQSD.float() @ k.float().transpose(-1, -2) / math.sqrt(q_BQSD.shape[-1])
    if is_causal:
        causal = torch.ones(scores_BQST.shape[-2:], dtype=torch.bool, device=q_BQSD.device).tril()
        scores_BQST = scores_BQST.masked_fill(~causal, -torch.inf)
    if mask is not None:
        scores_BQST = scores_BQST.masked_fill(~mask, -torch.inf)
    return (scores_BQST.softmax(-1) @ v.float()).to(q_BQSD.dtype)


def attend(q_BQSD: Tensor, k_BJTD: Tensor, v_BJTD: Tensor, ends_B: Tensor, num_slots: int, *, behind: bool) -> Tensor:
    """Attention of S new positions where a row's context takes up the first of ``num_slots`` slots, its length on the
    device in ``ends_B``; (B, Q, S, D).

    The new keys lie right behind each row's context, and a query sees those up to its own; or, with ``behind``, they
    are the S slots behind ``num_slots``, and every query sees all of them. All slots hold finite numbers.
    """
    kernel = kernel_for_few(q_BQSD, q_BQSD.shape[0], q_BQSD.shape[2], num_slots, q_BQSD.shape[3])
    if kernel is not None:
        fused: Tensor = kernel(q_BQSD, k_BJTD, v_BJTD, ends_B, num_slots, behind=behind)
        return fused
    num_keys, mask = seen(ends_B, q_BQSD.shape[2], num_slots, behind=behind)
    return attention(q_BQSD, k_BJTD[:, :, :num_keys], v_BJTD[:, :, :num_keys], mask)


def attend_reference(
    q_BQSD: Tensor, k_BJTD: Tensor, v_BJTD: Tensor, ends_B: Tensor, num_slots: int, *, behind: bool
) -> Tensor:
    """The same by the softmax that is written out."""
    num_keys, mask = seen(ends_B, q_BQSD.shape[2], num_slots, behind=behind)
    return attention_reference(q_BQSD, k_BJTD[:, :, :num_keys], v_BJTD[:, :, :num_keys], mask)


def kernel_for_few(
    example: Tensor, batch_size: int, num_new: int, num_slots: int, head_dim: int
) -> Callable[..., Tensor] | None:
    """One for so many new positions behind so many slots, on the device and in the precision of ``example``; None where
    they are not few, or it has not proved itself."""
    few = num_new <= KERNEL_MAX_NEW and batch_size * num_new <= KERNEL_MAX_ROWS and num_slots <= KERNEL_MAX_SLOTS
    small = batch_size * num_new * num_slots <= KERNEL_MAX_PAIRS and head_dim in KERNEL_DIMS
    return FEW_QUERIES.on(example.device, example.dtype) if few and small and kernels.may_serve(example) else None


def seen(ends_B: Tensor, num_new: int, num_slots: int, *, behind: bool) -> tuple[int, Tensor]:
    """Number of keys, and the mask (B, 1, S or 1, T) of those that the S new positions see; see :func:`attend`."""
    slots_T = torch.arange(num_slots, device=ends_B.device)
    if behind:
        seen_BT = functional.pad(slots_T < ends_B[:, None], (0, num_new), value=True)
        return num_slots + num_new, seen_BT[:, None, None]
    columns_BS = ends_B[:, None] + torch.arange(num_new, device=ends_B.device)
    return num_slots, (slots_T <= columns_BS[..., None])[:, None]


def _load_few_queries() -> Callable[..., Tensor]:
    from twotower_eval.engine.ops.fused import attention

    return attention.attend


def _few_queries_pairs(
    kernel: Callable[..., Tensor], device: torch.device, precision: torch.dtype
) -> Sequence[tuple[Tensor, Tensor]]:
    """A token, a block and an odd number, of contexts of one key, some, and nearly all; both places of new keys."""
    found = []
    ends_B = torch.tensor([1, 130, 290], device=device)
    for num_new in (1, 5, 16):
        for behind in (False, True):
            q_BSQD = kernels.seeded((3, num_new, 8, 64), device, precision, seed=num_new)
            k_BJTD, v_BJTD = (kernels.seeded((3, 2, 340, 64), device, precision, seed) for seed in (1, 2))
            given = (q_BSQD.transpose(1, 2), k_BJTD, v_BJTD, ends_B, 310)
            found.append((kernel(*given, behind=behind), attend_reference(*given, behind=behind)))
    return found


FEW_QUERIES = kernels.register(
    kernels.Kernel(name="fused attention of few queries", load=_load_few_queries, pairs=_few_queries_pairs)
)
