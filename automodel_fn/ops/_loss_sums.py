"""Dtypes of products, and their sums over chunks, in more digits than their factors have.

Shapes: T is tokens, H the hidden dimension, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def kept_dtype(tensor: Tensor, sums: torch.dtype) -> torch.dtype:
    """The dtype in which a gradient waits for what it will be multiplied by: never above its sums'.

    The gradients of a mean over many tokens are below the range of float16 until the scale of the
    loss has come.

    Example:
        >>> kept_dtype(torch.ones(1).half(), torch.float32)
        torch.float32
        >>> kept_dtype(torch.ones(1).double(), torch.float32)
        torch.float32
    """
    if tensor.dtype == torch.float16:
        return torch.float32
    return sums if tensor.dtype == torch.float64 else tensor.dtype


def sum_dtype_of(operand_dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums of products, of the softmax and of losses."""
    return torch.float64 if operand_dtype == torch.float64 else torch.float32


def product_dtype_of(operand_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype that operands have in the products, which their values fit into.

    Only a GPU multiplies bfloat16 with sums in float32. Gradients of logits, which are factors
    too, do not fit into the range of float16.

    Example:
        >>> product_dtype_of(torch.bfloat16, torch.device("cpu"))
        torch.float32
    """
    if operand_dtype == torch.bfloat16 and device.type == "cuda":
        return torch.bfloat16
    return sum_dtype_of(operand_dtype)


class WeightSum:
    """A sum of products over chunks that ends in a given tensor, rounded once.

    Where the tensor is narrower than sums are, the sums of its first rows are held in its own
    memory, so that only those of the rest need more: half of what a separate sum would take.

    Args:
        result: `[V, H]`, contiguous; what is in it is overwritten.
        dtype: The dtype of sums.
        num_products: How many will be added; a single one is not summed at all.
    """

    def __init__(self, result: Tensor, dtype: torch.dtype, *, num_products: int) -> None:
        self._result = result
        self._is_begun = False
        self._is_single = num_products <= 1
        self._parts = (result,)
        if result.dtype != dtype and not self._is_single:
            width = dtype.itemsize // result.dtype.itemsize
            num_first = len(result) // width
            memory = result[: num_first * width].view(-1).view(dtype)
            rest = torch.empty_like(result[num_first:], dtype=dtype)
            self._parts = (memory.view(num_first, result.shape[1]), rest)

    def spare(self, dtype: torch.dtype) -> Tensor:
        """Memory, as a vector, that nothing else is put into before the only product is written."""
        numel = self._result.numel() * self._result.dtype.itemsize // dtype.itemsize
        size = numel * dtype.itemsize // self._result.dtype.itemsize if self._is_single else 0
        return self._result.view(-1)[:size].view(dtype)

    def parts(self) -> Iterator[tuple[slice, Tensor, bool]]:
        """Where to put the next product: rows of it, their tensor, and whether to add to that."""
        start, is_begun = 0, self._is_begun
        self._is_begun = True
        for part in self._parts:
            yield slice(start, start + len(part)), part, is_begun
            start += len(part)

    def result(self) -> Tensor:
        """The sum, in the tensor that was given for it; nothing can be added after."""
        if not self._is_begun:
            return self._result.zero_()
        if len(self._parts) > 1:
            first, rest = self._parts
            start, stop = 0, 1
            while start < len(first):
                # Rounded, these rows end before they are read, but for the very first.
                rows = first[start:stop]
                self._result[start:stop].copy_(rows if start else rows.clone())
                start, stop = stop, min(2 * stop, len(first))
            self._result[len(first) :].copy_(rest)
            self._parts = ()
        return self._result
