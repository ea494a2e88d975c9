"""The weight of a head as bfloat16 parts, which multiply bfloat16 hidden states exactly.

Shapes: H is the hidden dimension, V the vocabulary, P the number of parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import attrs
import torch
from torch import Tensor

from automodel_fn.dtypes import dtype_name
from automodel_fn.errors import ConfigError
from automodel_fn.ops._split import num_parts_of, split_

# Rows are split this many numbers at a time, so that what is held meanwhile stays small.
_NUMBERS_AT_ONCE = 2**26


@attrs.frozen(eq=False)
class WeightParts:
    """A weight as a sum of bfloat16 parts. Made by `weight_parts`; never changed.

    The parts lie side by side, the smallest first: `[low | middle | high]` of a float32 weight,
    `[low | high]` of a float16 one; a bfloat16 weight is its own single part. So one product with
    as many copies of the hidden states side by side adds all of them, small terms first.

    Args:
        stacked: `[V, P * H]`, bfloat16.
        num_parts: P.
        is_exact: Whether the parts add up to the weight bit for bit (-0.0 and 0.0 count as equal).
            Where they do not, products are made of the weight itself, in float32.

    Example:
        >>> parts = weight_parts(torch.full((1, 2), 1 / 3))
        >>> parts.num_parts, parts.is_exact, parts.high
        (3, True, tensor([[0.3340, 0.3340]], dtype=torch.bfloat16))
    """

    stacked: Tensor
    num_parts: int = attrs.field(kw_only=True)
    is_exact: bool = attrs.field(kw_only=True)

    @property
    def high(self) -> Tensor:
        """`[V, H]`: the weight, rounded to bfloat16."""
        return self.part(0)

    def part(self, index: int) -> Tensor:
        """`[V, H]`: a part; 0 is the largest."""
        return self.stacked.unflatten(1, (self.num_parts, -1))[:, self.num_parts - 1 - index]


def weight_parts(weight: Tensor) -> WeightParts:
    """The parts of a weight, each bfloat16: three of float32, two of float16, one of bfloat16.

    The parts of a float32 weight take one and a half times its memory, those of a float16 one
    twice; a bfloat16 weight is its own part. They add up exactly unless a number is not finite,
    near float32's largest (3.39e38, which bfloat16 rounds to infinity), or not 0 and below about
    2**-108. To look at that waits for the device once.

    Args:
        weight: `[V, H]`, float32, float16 or bfloat16; of a DTensor, what this rank holds is split.

    Raises:
        ConfigError: The weight is not as described.

    Example:
        >>> weight = torch.tensor([[0.1, 1e-40]])
        >>> weight_parts(weight[:, :1]).is_exact, weight_parts(weight).is_exact
        (True, False)
    """
    local: Any = weight.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    num_parts = num_parts_of(local.dtype)
    if num_parts is None or local.dim() != 2:
        raise ConfigError(
            f"weight of shape {tuple(weight.shape)} and dtype {dtype_name(weight.dtype)} must be "
            "[V, H], fp32, fp16 or bf16, to be split into bf16 parts."
        )
    if num_parts == 1:
        return WeightParts(local, num_parts=1, is_exact=True)
    demand_no_capture(local)
    num_rows, width = local.shape
    stacked = local.new_empty(num_rows, num_parts * width, dtype=torch.bfloat16)
    flags = [
        split_stacked_(local[rows], stacked[rows], num_parts)
        for rows in row_chunks(num_rows, width)
    ]
    is_exact = not flags or bool(torch.stack(flags).all())
    return WeightParts(stacked, num_parts=num_parts, is_exact=is_exact)


def rounded_weight(weight: Tensor) -> WeightParts:
    """The weight rounded to bfloat16, as a single part: what `precision="bf16"` multiplies.

    Args:
        weight: `[V, H]`; of a DTensor, what this rank holds is rounded.

    Example:
        >>> rounded_weight(torch.full((1, 1), 1 / 3)).high
        tensor([[0.3340]], dtype=torch.bfloat16)
    """
    local: Any = weight.detach()
    local = local.to_local() if hasattr(local, "to_local") else local
    is_exact = local.dtype == torch.bfloat16
    return WeightParts(local.to(torch.bfloat16), num_parts=1, is_exact=is_exact)


def demand_no_capture(weight: Tensor) -> None:
    """Raise where a CUDA graph is being recorded, which cannot wait for the device."""
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ConfigError(
            "the parts of a weight are made while a CUDA graph is recorded, and to know whether "
            "they are exact waits for the device; make them before it: weight_parts=..., or one "
            "forward of an LMHead."
        )


def split_stacked_(weight: Tensor, stacked: Tensor, num_parts: int) -> Tensor:
    """Write the parts of `[R, H]` to `[R, P * H]`; whether they are exact, as `split_` says it."""
    parts = stacked.unflatten(1, (num_parts, -1)).transpose(0, 1)
    return split_(weight, parts)


def row_chunks(num_rows: int, width: int) -> Iterator[slice]:
    """Rows, some at a time, of a matrix whose rows have that many numbers."""
    size = max(1, _NUMBERS_AT_ONCE // max(1, width))
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
