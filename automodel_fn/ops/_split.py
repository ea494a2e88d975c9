"""A tensor as a sum of bfloat16 tensors.

A float32 number has 24 significant bits and a bfloat16 number 8, so that three parts hold all of
one: each is what bfloat16 makes of the rest that the ones before it left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from automodel_fn.ops._choice import KernelChoice

_NUM_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def num_parts_of(dtype: torch.dtype) -> int | None:
    """How many bfloat16 parts hold every bit of a dtype; None for one that is not split.

    Example:
        >>> num_parts_of(torch.float32), num_parts_of(torch.float16), num_parts_of(torch.float64)
        (3, 2, None)
    """
    return _NUM_PARTS.get(dtype)


def split_kernel(x: Tensor) -> KernelChoice:
    """What splits a tensor into its parts: Triton on CUDA, else torch.

    Example:
        >>> split_kernel(torch.ones(1)).reason
        'x is on cpu'
    """
    if x.is_cuda and torch.version.hip is None:
        return KernelChoice("triton", reason="x is on cuda")
    return KernelChoice("torch", reason=f"x is on {x.device.type}")


def split_(x: Tensor, parts: Tensor) -> Tensor:
    """Write the parts of a matrix, and say whether their sum is the matrix, without waiting for it.

    Of an infinity, and of what bfloat16 rounds to one, the first part is infinite and the others
    are 0; with NaN alike.

    Args:
        x: `[R, C]`, of any strides.
        parts: `[P, R, C]`, bfloat16, any P, its last stride 1; the first part is the last of these,
            so that a product that goes through them in order adds small terms first.

    Returns:
        `[]`, bool, on the device of `x`: every number is finite and the sum of its parts.
    """
    if split_kernel(x).name == "triton" and x.numel():
        from automodel_fn.ops._split_triton import launch_split

        return launch_split(x, parts)
    return _split_by_torch(x, parts)


def _split_by_torch(x: Tensor, parts: Tensor) -> Tensor:
    rest = x.float()
    for part in reversed(parts.unbind()):
        part.copy_(rest)
        rest = rest - part.float()
        # What an infinity leaves is NaN, which would spread to sums that are infinite only.
        rest = torch.where(rest.isfinite(), rest, 0.0)
    return (rest == 0).all() & parts[-1].isfinite().all()
