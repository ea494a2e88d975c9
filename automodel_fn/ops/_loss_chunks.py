"""The loss of a language model's head over chunks of tokens, with its gradients.

Shapes: T is tokens, H the hidden dimension, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import attrs
import torch
from torch import Tensor

from automodel_fn.ops._loss_sums import (
    WeightSum,
    kept_dtype,
    multiply,
    product_dtype_of,
    sum_dtype_of,
)
from automodel_fn.ops._loss_terms import LossTerms, chunk_sizes, write_token_losses

# Products are slow where rows do not start at multiples of 16 bytes, as of a vocabulary of 50257.
_ROW_BYTES = 128


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
    chunk_size: int | None = None,
    write: Callable[..., None] = write_token_losses,
) -> ChunkedLoss:
    """The losses of all tokens and the gradients that are wanted, chunk by chunk.

    Args:
        inputs: Plain tensors of one device.
        terms: The terms of the loss.
        wanted: Which gradients to compute.
        operand_dtype: What hidden states and weight are rounded to before they are multiplied.
        chunk_size: How many tokens' gradients of logits are held; None chooses.
        write: What computes the losses of a chunk from its logits.
    """
    product_dtype = product_dtype_of(operand_dtype, inputs.hidden.device)
    hidden, weight = (
        tensor.to(operand_dtype).to(product_dtype) for tensor in (inputs.hidden, inputs.weight)
    )
    (num_tokens, _), vocabulary = hidden.shape, len(weight)
    sums = sum_dtype_of(operand_dtype)
    sizes = chunk_sizes(num_tokens, vocabulary, product_dtype, chunk_size)
    losses, z_losses = (hidden.new_empty(num_tokens, dtype=sums) for _ in range(2))
    of_hidden = _like(inputs.hidden) if wanted.hidden else None
    num_held = -(-num_tokens // sizes.held)
    of_weight = None
    if wanted.weight:
        of_weight = WeightSum(_like(inputs.weight), sums, num_products=num_held)
    of_bias = hidden.new_zeros(vocabulary, dtype=sums) if wanted.bias else None
    held = _rows(hidden, sizes.held if wanted.any else 0, vocabulary, product_dtype)
    is_in_place = wanted.any and product_dtype == sums
    logits = _rows(hidden, 0 if is_in_place else sizes.rows, vocabulary, sums)
    scale = inputs.scale.expand(num_tokens)
    for outer in _slices(0, num_tokens, sizes.held):
        gradients = held[: outer.stop - outer.start]
        for inner in _slices(outer.start, outer.stop, sizes.rows):
            size, offset = inner.stop - inner.start, inner.start - outer.start
            target = gradients[offset : offset + size] if wanted.any else None
            found = logits[:size] if target is None or not is_in_place else target
            multiply(hidden[inner], weight.t(), found)
            of_tokens = losses[inner], z_losses[inner]
            write(found, inputs.labels[inner], inputs.bias, scale[inner], terms, *of_tokens, target)
        if of_hidden is not None:
            multiply(gradients, weight, of_hidden[outer])
        if of_weight is not None:
            of_weight.add(gradients.t(), hidden[outer])
        if of_bias is not None:
            of_bias += gradients.sum(0, dtype=sums)
    return ChunkedLoss(
        losses,
        z_losses=z_losses,
        of_hidden=of_hidden,
        of_weight=None if of_weight is None else of_weight.result(),
        of_bias=of_bias,
    )


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=kept_dtype(tensor), device=tensor.device)


def _rows(like: Tensor, size: int, vocabulary: int, dtype: torch.dtype) -> Tensor:
    step = _ROW_BYTES // dtype.itemsize
    width = -(-vocabulary // step) * step
    return like.new_empty(size, width, dtype=dtype)[:, :vocabulary]


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))
