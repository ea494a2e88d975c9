"""The three products of a head, of bfloat16 operands and parts, added in float32.

A product of two bfloat16 numbers has 16 significant bits and is exact in float32, so that only the
sums round. Where a float32 factor meets another, it is split (`_split`), and the products of parts
are added, small terms first, as far as the result can show them.

Shapes: T is tokens, H the hidden dimension, V the vocabulary, P the number of parts of the weight.
Nothing here is known to autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor

from automodel_fn.ops._heads import NARROW_DTYPES
from automodel_fn.ops._split import num_parts_of, split_
from automodel_fn.ops._weight_parts import WeightParts, row_chunks, split_stacked_

_NUM_PARTS_OF_NARROW = 2
"""16 bits: what is rounded to 8 or 11 bits afterwards shows no more."""
_ROW_STEP = 64
"""Rows start at multiples of this many numbers: where they do not, products take longer."""


def multiply_(total: Tensor, left: Tensor, right: Tensor, *, is_added: bool = False) -> None:
    """Write the product of two matrices, or add it to what is there.

    The product of narrow matrices is made in float32 where that is the dtype of the total; the CPU
    upcasts them for it. Where the total has fewer digits than they, it is rounded once.

    Args:
        total: `[m, n]`, in the dtype of the factors, or float32, or, if nothing is added, any.
        left: `[m, k]`.
        right: `[k, n]`, of the same dtype.
        is_added: Add to what is there.
    """
    is_wider = total.dtype == torch.float32 and left.dtype in NARROW_DTYPES
    if is_wider and not left.is_cuda:
        left, right, is_wider = left.float(), right.float(), False
    if is_wider and is_added:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    elif is_wider:
        torch.mm(left, right, out_dtype=torch.float32, out=total)
    elif is_added:
        total.addmm_(left, right)
    elif left.dtype == total.dtype:
        torch.mm(left, right, out=total)
    else:
        total.copy_(left @ right)


def logits_by_parts(hidden: Tensor, parts: WeightParts) -> Tensor:
    """`hidden @ weight.T` in float32, in one product that adds the parts in its own sum.

    Args:
        hidden: `[T, H]`, bfloat16.
        parts: Of the weight `[V, H]`.
    """
    logits = hidden.new_empty(len(hidden), len(parts.stacked), dtype=torch.float32)
    multiply_(logits, hidden.repeat(1, parts.num_parts), parts.stacked.t())
    return logits


def logits_by_splitting(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """As `logits_by_parts`, splitting some rows of the weight at a time; and if that was exact.

    Args:
        hidden: `[T, H]`, bfloat16.
        weight: `[V, H]`, float32, float16 or bfloat16.

    Returns:
        Logits `[T, V]`, and a bool `[]` on their device, which nothing has waited for.
    """
    num_parts = _num_parts(weight)
    if num_parts == 1:
        parts = WeightParts(weight, num_parts=1, is_exact=True)
        return logits_by_parts(hidden, parts), weight.new_ones((), dtype=torch.bool)
    num_rows, width = weight.shape
    wide = hidden.repeat(1, num_parts)
    logits = hidden.new_empty(len(hidden), num_rows, dtype=torch.float32)
    is_exact = weight.new_ones((), dtype=torch.bool)
    for rows in row_chunks(num_rows, width):
        stacked = weight.new_empty(rows.stop - rows.start, num_parts * width, dtype=torch.bfloat16)
        is_exact = is_exact & split_stacked_(weight[rows], stacked, num_parts)
        multiply_(logits[:, rows], wide, stacked.t())
    return logits, is_exact


def hidden_gradient(grad: Tensor, weight: Tensor | WeightParts) -> Tensor:
    """`grad @ weight`, rounded to bfloat16.

    A float32 gradient meets a float32 weight in three products of the two largest parts of each,
    which leave out what is below 2**-16 of a term; bfloat16 rounds the sum at 2**-9.

    Args:
        grad: `[T, V]`, float32, float16 or bfloat16.
        weight: `[V, H]`, or its parts.

    Returns:
        `[T, H]`, bfloat16.
    """
    is_split = isinstance(weight, WeightParts)
    num_parts = weight.num_parts if is_split else _num_parts(weight)
    width = weight.stacked.shape[1] // num_parts if is_split else weight.shape[1]
    num_seen = min(num_parts, _NUM_PARTS_OF_NARROW) * width
    # Beside each other: what the parts of the weight give, the largest last.
    total = grad.new_zeros(len(grad), num_seen, dtype=torch.float32)
    for rows in row_chunks(grad.shape[1], max(width, len(grad))):
        of_weight = weight.stacked[rows, -num_seen:] if is_split else _stacked(weight[rows])
        of_grad = _parts(grad[:, rows], _NUM_PARTS_OF_NARROW)
        for smaller in of_grad[:-1]:
            multiply_(total[:, -width:], smaller, of_weight[:, -width:], is_added=True)
        multiply_(total, of_grad[-1], of_weight, is_added=True)
    return total.unflatten(1, (-1, width)).sum(1).to(torch.bfloat16)


def weight_gradient(grad: Tensor, hidden: Tensor, dtype: torch.dtype) -> Tensor:
    """`grad.T @ hidden`, rounded to the dtype of the weight.

    For a float32 weight every bit of a float32 gradient counts: three products. For a narrower one
    two parts of it do.

    Args:
        grad: `[T, V]`, float32, float16 or bfloat16.
        hidden: `[T, H]`, bfloat16.
        dtype: Of the result.

    Returns:
        `[V, H]`.
    """
    is_wide = dtype == torch.float32
    found = hidden.new_empty(grad.shape[1], hidden.shape[1], dtype=dtype)
    num_parts = min(_num_parts(grad), 3 if is_wide else _NUM_PARTS_OF_NARROW)
    tall = hidden.repeat(num_parts, 1)
    for rows in row_chunks(len(found), max(hidden.shape)):
        # One under the other, the smallest first: one product adds them all.
        parts = _parts(grad[:, rows], num_parts).flatten(0, 1)
        product = found[rows] if is_wide else torch.empty_like(found[rows], dtype=torch.float32)
        multiply_(product, parts.t(), tall)
        if not is_wide:
            found[rows].copy_(product)
    return found


def _num_parts(tensor: Tensor) -> int:
    num_parts = num_parts_of(tensor.dtype)
    assert num_parts is not None, f"{tensor.dtype} is not split into bf16 parts"
    return num_parts


def _parts(x: Tensor, most: int) -> Tensor:
    """`[P, R, C]` of `[R, C]`, the smallest first, with rows that start where products are fast."""
    num_parts = min(_num_parts(x), most)
    if x.dtype == torch.bfloat16 and x.stride(1) == 1 and x.stride(0) % _ROW_STEP == 0:
        return x.unsqueeze(0)
    width = -(-x.shape[1] // _ROW_STEP) * _ROW_STEP
    parts = x.new_empty(num_parts, len(x), width, dtype=torch.bfloat16)[..., : x.shape[1]]
    split_(x, parts)
    return parts


def _stacked(weight: Tensor) -> Tensor:
    """`[R, P * H]` of rows of a weight: its largest parts side by side, the largest last."""
    num_parts = min(_num_parts(weight), _NUM_PARTS_OF_NARROW)
    if num_parts == 1:
        return weight
    num_rows, width = weight.shape
    stacked = weight.new_empty(num_rows, num_parts * width, dtype=torch.bfloat16)
    split_stacked_(weight, stacked, num_parts)
    return stacked
