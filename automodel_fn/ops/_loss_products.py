"""The three products of a head's loss, chunk by chunk.

Shapes: T is tokens, t those of a chunk, H the hidden dimension, V the vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from automodel_fn.ops._loss_sums import WeightSum, product_dtype_of
from automodel_fn.ops._products import hidden_gradient, multiply_, weight_gradient
from automodel_fn.ops._split import num_parts_of
from automodel_fn.ops._weight_parts import row_chunks, split_stacked_


class Products(Protocol):
    """The products of hidden states `[T, H]` and a weight `[V, H]`, and their gradients."""

    @property
    def gradient_dtype(self) -> torch.dtype:
        """The dtype in which gradients of logits are multiplied."""
        ...

    def write_logits(self, rows: slice, logits: Tensor) -> None:
        """Write the logits `[t, V]` of some rows, in the dtype of sums."""
        ...

    def write_hidden_gradient(self, gradients: Tensor, of_hidden: Tensor) -> None:
        """Write `[t, H]` of the gradients `[t, V]` of logits."""
        ...

    def add_weight_gradient(self, gradients: Tensor, rows: slice, total: WeightSum) -> None:
        """Add what the gradients `[t, V]` of the logits of some rows make of the weight."""
        ...


class PlainProducts:
    """Products of operands in one dtype, added in the dtype of sums.

    Args:
        hidden: `[T, H]`.
        weight: `[V, H]`.
        operand_dtype: What both are rounded to first.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, operand_dtype: torch.dtype) -> None:
        self.gradient_dtype = product_dtype_of(operand_dtype, hidden.device)
        self._hidden = hidden.to(operand_dtype).to(self.gradient_dtype)
        self._weight = weight.to(operand_dtype).to(self.gradient_dtype)

    def write_logits(self, rows: slice, logits: Tensor) -> None:
        multiply_(logits, self._hidden[rows], self._weight.t())

    def write_hidden_gradient(self, gradients: Tensor, of_hidden: Tensor) -> None:
        multiply_(of_hidden, gradients, self._weight)

    def add_weight_gradient(self, gradients: Tensor, rows: slice, total: WeightSum) -> None:
        for part, target, is_begun in total.parts():
            multiply_(target, gradients[:, part].t(), self._hidden[rows], is_added=is_begun)


class SplitProducts:
    """Products of bfloat16 parts, which are exact, added in float32; for CUDA.

    The parts of the weight are made anew for each chunk, some rows at a time: kept, they would take
    more memory than what chunks save.

    Args:
        hidden: `[T, H]`, bfloat16.
        weight: `[V, H]`, float32, float16 or bfloat16.
    """

    gradient_dtype = torch.float32

    def __init__(self, hidden: Tensor, weight: Tensor) -> None:
        self._hidden, self._weight = hidden, weight

    def write_logits(self, rows: slice, logits: Tensor) -> None:
        num_parts = num_parts_of(self._weight.dtype)
        assert num_parts is not None, f"{self._weight.dtype} is not split into bf16 parts"
        num_rows, width = self._weight.shape
        wide = self._hidden[rows].repeat(1, num_parts)
        for part in row_chunks(num_rows, width):
            piece = self._weight[part]
            stacked = self._hidden.new_empty(len(piece), num_parts * width)
            split_stacked_(piece, stacked, num_parts)
            multiply_(logits[:, part], wide, stacked.t())

    def write_hidden_gradient(self, gradients: Tensor, of_hidden: Tensor) -> None:
        of_hidden.copy_(hidden_gradient(gradients, self._weight))

    def add_weight_gradient(self, gradients: Tensor, rows: slice, total: WeightSum) -> None:
        for part, target, is_begun in total.parts():
            for piece in row_chunks(len(target), self._hidden.shape[1]):
                inner = slice(part.start + piece.start, part.start + piece.stop)
                found = weight_gradient(gradients[:, inner], self._hidden[rows], torch.float32)
                target[piece].add_(found) if is_begun else target[piece].copy_(found)
