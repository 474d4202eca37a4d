"""Products of a few token rows with a weight on a CPU, where time goes into reading the weight.

MKL's product with one row, or with few, reads a weight that is not in the cache at half the speed at which it can be
read. Measured on a weight of (352, 256) float32 from memory, in microseconds (19 GB/s would be 19):

    rows                                    1     2     4     8    16
    ``x @ weight.T``                       42    52    60    66    79
    ``(weight @ x.T).T``                   43    21    29    46    78
    two halves of the weight as a batch    20     -     -     -     -
    ``x @ weight.T``, laid out input by input  38    46    38    44    58

Shape letters: see ops/__init__; O outputs, I inputs of the weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from twotower_eval.engine.ops import kernels

FEW_ROWS = 8


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """``x @ weight.T``, contiguous, (..., O)."""
    num_outputs, num_inputs = weight_OI.shape
    num_rows = x.numel() // num_inputs
    if num_rows == 1 and kernels.may_serve(x, weight_OI):
        kernel = ROW_PRODUCT.on(x.device, x.dtype)
        if kernel is not None:
            fused: Tensor = kernel(x, weight_OI)
            return fused
    if num_rows > FEW_ROWS or not _reads_fast(x, weight_OI):
        return functional.linear(x, weight_OI)
    if num_rows == 1 and num_outputs % 2 == 0:
        return torch.bmm(in_halves(weight_OI), as_columns(x)).view(*x.shape[:-1], num_outputs)
    out_OR = torch.mm(weight_OI, x.reshape(num_rows, num_inputs).t())
    return out_OR.t().contiguous().view(*x.shape[:-1], num_outputs)


def reads_halves(x: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether these weights, (O, I) or stacks of such, can be multiplied with one row half by half."""
    return all(weight.shape[-2] % 2 == 0 and _reads_fast(x, weight) for weight in weights)


def in_halves(weight_OI: Tensor) -> Tensor:
    """The upper and the lower half of a contiguous weight, (2, O / 2, I)."""
    return weight_OI.view(2, -1, weight_OI.shape[1])


def as_columns(x: Tensor) -> Tensor:
    """One contiguous row of I as a column for each half of a weight, (2, I, 1), without a copy. Strides of a row, not
    of a column: MKL goes a slower way with those."""
    num_inputs = x.numel()
    return x.as_strided((2, num_inputs, 1), (0, 1, num_inputs))


def _reads_fast(x: Tensor, weight: Tensor) -> bool:
    return (
        x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and x.is_contiguous()
        and weight.is_contiguous()
        and not (x.requires_grad or weight.requires_grad)
    )


def _load_row_product() -> Callable[..., Tensor]:
    from twotower_eval.engine.ops.fused import product

    return product.linear_of_row


def _row_product_pairs(
    kernel: Callable[..., Tensor], device: torch.device, precision: torch.dtype
) -> Sequence[tuple[Tensor, Tensor]]:
    """Few outputs and many, rows of less than a piece, of one, and of more; sizes that no tile divides."""
    found = []
    for num_outputs, num_inputs in ((3, 40), (330, 200), (50, 4096), (50, 5000)):
        weight_OI = kernels.seeded((num_outputs, num_inputs), device, precision, seed=num_outputs)
        x_11I = kernels.seeded((1, 1, num_inputs), device, precision, seed=1)
        found.append((kernel(x_11I, weight_OI), (x_11I.double() @ weight_OI.double().T).to(precision)))
    return found


ROW_PRODUCT = kernels.register(
    kernels.Kernel(name="fused product of a row", load=_load_row_product, pairs=_row_product_pairs)
)
