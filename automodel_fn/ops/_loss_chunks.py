"""The loss of a language model's head over chunks of tokens, with its gradients.

Shapes: T is tokens, H the hidden dimension, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs
import torch
from torch import Tensor

from automodel_fn.ops._loss_products import PlainProducts, Products, SplitProducts
from automodel_fn.ops._loss_sums import WeightSum, kept_dtype, sum_dtype_of
from automodel_fn.ops._loss_terms import ChunkSizes, LossTerms, chunk_sizes, write_token_losses

# Products are slow where rows do not start at multiples of 16 bytes, as of a vocabulary of 50257.
_ROW_BYTES = 128
# As many logits at a time as products gain from.
_SPARE_ROWS = 2048


@attrs.frozen(eq=False)
class LossInputs:
    """What the loss of a head is computed from.

    Args:
        hidden: `[T, H]`.
        weight: `[V, H]`.
        bias: `[V]`, or None.
        labels: `[T]`, integers.
        scale: `[]` or `[T]`: what the loss of a token is multiplied by.
    """

    hidden: Tensor
    weight: Tensor = attrs.field(kw_only=True)
    bias: Tensor | None = attrs.field(kw_only=True)
    labels: Tensor = attrs.field(kw_only=True)
    scale: Tensor = attrs.field(kw_only=True)


@attrs.frozen(eq=False)
class Wanted:
    """Which gradients are wanted."""

    hidden: bool
    weight: bool = attrs.field(kw_only=True)
    bias: bool = attrs.field(kw_only=True)

    @property
    def any(self) -> bool:
        """Whether one is."""
        return self.hidden or self.weight or self.bias


@attrs.frozen(eq=False)
class ChunkedLoss:
    """The losses of tokens, not scaled, and the gradients of their scaled sum.

    Args:
        losses: `[T]`, in the dtype of sums.
        z_losses: `[T]`: the part of them that is the z-loss.
        of_hidden: `[T, H]`; None where it was not wanted, as the others.
        of_weight: `[V, H]`.
        of_bias: `[V]`, in the dtype of sums.
    """

    losses: Tensor
    z_losses: Tensor = attrs.field(kw_only=True)
    of_hidden: Tensor | None = attrs.field(kw_only=True)
    of_weight: Tensor | None = attrs.field(kw_only=True)
    of_bias: Tensor | None = attrs.field(kw_only=True)


def chunked_loss(
    inputs: LossInputs,
    terms: LossTerms,
    wanted: Wanted,
    *,
    operand_dtype: torch.dtype,
    is_split: bool = False,
    chunk_size: int | None = None,
    write: Callable[..., None] = write_token_losses,
) -> ChunkedLoss:
    """The losses of all tokens and the gradients that are wanted, chunk by chunk.

    Args:
        inputs: Plain tensors of one device.
        terms: The terms of the loss.
        wanted: Which gradients to compute.
        operand_dtype: What hidden states and weight are rounded to before they are multiplied.
        is_split: On CUDA, multiply bfloat16 parts of the weight and of the gradients of logits.
        chunk_size: How many tokens' gradients of logits are held; None chooses.
        write: What computes the losses of a chunk from its logits.
    """
    products = _products(inputs, operand_dtype, is_split)
    dtype, sums = products.gradient_dtype, sum_dtype_of(operand_dtype)
    num_tokens, vocabulary = len(inputs.hidden), len(inputs.weight)
    sizes = chunk_sizes(num_tokens, vocabulary, dtype, chunk_size, wants_weight=wanted.weight)
    losses, z_losses = (_empty(inputs.hidden, (num_tokens,), sums) for _ in range(2))
    of_hidden = _gradient_of(inputs.hidden, sums) if wanted.hidden else None
    of_weight = None
    if wanted.weight:
        num_held = -(-num_tokens // sizes.held)
        of_weight = WeightSum(_gradient_of(inputs.weight, sums), sums, num_products=num_held)
    of_bias = inputs.weight.new_zeros(vocabulary, dtype=sums) if wanted.bias else None
    is_in_place = wanted.any and dtype == sums
    held = _rows(inputs.hidden, sizes.held if wanted.any else 0, vocabulary, dtype)
    logits = held if is_in_place else _logits(inputs.hidden, sizes, vocabulary, sums, of_weight)
    num_rows = min(sizes.rows if is_in_place else len(logits), sizes.held)
    scale = inputs.scale.expand(num_tokens)
    for outer in _slices(0, num_tokens, sizes.held):
        gradients = held[: outer.stop - outer.start]
        if is_in_place:
            products.write_logits(outer, gradients)
        for rows in _slices(outer.start, outer.stop, num_rows):
            target = gradients[rows.start - outer.start : rows.stop - outer.start]
            found = target if is_in_place else logits[: rows.stop - rows.start]
            if not is_in_place:
                products.write_logits(rows, found)
            of_rows = (inputs.labels[rows], inputs.bias, scale[rows], terms)
            write(found, *of_rows, losses[rows], z_losses[rows], target if wanted.any else None)
        if of_hidden is not None:
            products.write_hidden_gradient(gradients, of_hidden[outer])
        if of_weight is not None:
            products.add_weight_gradient(gradients, outer, of_weight)
        if of_bias is not None:
            of_bias += gradients.sum(0, dtype=sums)
    return ChunkedLoss(
        losses,
        z_losses=z_losses,
        of_hidden=of_hidden,
        of_weight=None if of_weight is None else of_weight.result(),
        of_bias=of_bias,
    )


def _products(inputs: LossInputs, operand_dtype: torch.dtype, is_split: bool) -> Products:
    if is_split and inputs.hidden.is_cuda:
        return SplitProducts(inputs.hidden, inputs.weight)
    return PlainProducts(inputs.hidden, inputs.weight, operand_dtype)


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=like.device)


def _gradient_of(tensor: Tensor, sums: torch.dtype) -> Tensor:
    return _empty(tensor, tensor.shape, kept_dtype(tensor, sums))


def _rows(like: Tensor, size: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    return _empty(like, (size, _width(vocabulary, dtype)), dtype)[:, :vocabulary]


def _width(vocabulary: int, dtype: torch.dtype) -> int:
    step = _ROW_BYTES // dtype.itemsize
    return -(-vocabulary // step) * step


def _logits(
    like: Tensor,
    sizes: ChunkSizes,
    vocabulary: int,
    dtype: torch.dtype,
    of_weight: WeightSum | None,
) -> Tensor:
    """Memory for logits: that of the gradient of the weight, where it is not needed before."""
    width = _width(vocabulary, dtype)
    spare = like.new_empty(0, dtype=dtype) if of_weight is None else of_weight.spare(dtype)
    size = min(len(spare) // width, _SPARE_ROWS)
    if size <= sizes.rows:
        return _rows(like, sizes.rows, vocabulary, dtype)
    return spare[: size * width].view(size, width)[:, :vocabulary]


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
