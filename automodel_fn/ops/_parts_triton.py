"""The gradient of a weight that all rows share, of parts: no atomics, the same in every run."""
# Triton is in no build of torch for the CPU, and what its language returns is not typed.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from automodel_fn.ops._launch import Launcher, ceil_div

_ROWS, _BLOCK, _WARPS = 128, 16, 4


@triton.jit
def _sum_kernel(
    parts_ptr, total_ptr, num_parts, LENGTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, num_parts, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        mask = (rows < num_parts) & (columns < LENGTH)
        total += tl.load(parts_ptr + rows * LENGTH + columns, mask=mask, other=0.0)
    found = tl.sum(total, 0, keep_dims=True).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + columns, found, mask=columns < LENGTH)


_launch_sum = Launcher(_sum_kernel)


def new_parts(weight: Tensor, num_parts: int) -> Tensor:
    """`[num_parts, H]` in float32, not filled: what each program sums over its own rows."""
    return weight.new_empty((num_parts, weight.shape[0]), dtype=torch.float32)


def add_up(parts: Tensor, total: Tensor, alike: Hashable = None) -> None:
    """Fill `total` `[H]` with the sum of `parts` `[num_parts, H]`, added in float32.

    Args:
        parts: In float32, contiguous.
        total: Contiguous.
        alike: What both shapes, the dtype of the total and the device follow from.
    """
    relaunch = _launch_sum.again(alike)
    if relaunch is not None and relaunch(parts, total):
        return
    num_parts, length = parts.shape
    _launch_sum(
        (ceil_div(length, _BLOCK), 1, 1),
        (parts, total, num_parts),
        (length, _ROWS, _BLOCK),
        num_warps=_WARPS,
        alike=alike,
    )
