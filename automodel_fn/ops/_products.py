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

from automodel_fn.ops._split import num_parts_of, split_
from automodel_fn.ops._weight_parts import WeightParts, row_chunks, split_stacked_

_NUM_PARTS_OF_NARROW = 2
"""16 bits: what is rounded to 8 or 11 bits afterwards shows no more."""
_ROW_STEP = 64
"""Rows start at multiples of this many numbers: where they do not, products take longer."""


def multiply_(total: Tensor, left: Tensor, right: Tensor, *, is_added: bool = False) -> None:
    """Write a product of bfloat16 matrices to a float32 one, or add it; the CPU upcasts them.

    Args:
        total: `[m, n]`, float32.
        left: `[m, k]`, bfloat16.
        right: `[k, n]`, bfloat16.
        is_added: Add to what is there.
    """
    if not left.is_cuda:
        product = left.float() @ right.float()
        total.add_(product) if is_added else total.copy_(product)
    elif is_added:
        torch.addmm(total, left, right, out_dtype=torch.float32, out=total)
    else:
        torch.mm(left, right, out_dtype=torch.float32, out=total)


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
    num_rows = grad.shape[1]
    if isinstance(weight, WeightParts):
        width = weight.stacked.shape[1] // weight.num_parts
    else:
        width = weight.shape[1]
    total = grad.new_zeros(len(grad), width, dtype=torch.float32)
    for rows in row_chunks(num_rows, max(width, len(grad))):
        of_grad = _parts(grad[:, rows], _NUM_PARTS_OF_NARROW)
        of_weight = _parts_of_rows(weight, rows)
        pairs = [(i, j) for i in range(len(of_grad)) for j in range(len(of_weight))]
        for i, j in sorted(pairs, key=sum, reverse=True):
            if i + j < _NUM_PARTS_OF_NARROW:
                multiply_(total, of_grad[-1 - i], of_weight[-1 - j], is_added=True)
    return total.to(torch.bfloat16)


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


def _parts_of_rows(weight: Tensor | WeightParts, rows: slice) -> Tensor:
    if isinstance(weight, WeightParts):
        return weight.stacked[rows].unflatten(1, (weight.num_parts, -1)).transpose(0, 1)
    return _parts(weight[rows], _NUM_PARTS_OF_NARROW)
