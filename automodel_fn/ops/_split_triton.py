"""The kernel of `split_`. Imports Triton: to be imported where a CUDA tensor comes in."""
# Triton is in no build of torch for the CPU, and what its language returns is not typed.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from automodel_fn.ops._launch import Launcher, ceil_div

_BLOCK = 1024
_NUM_WARPS = 4


@triton.jit
def _split_kernel(
    x_ptr,
    parts_ptr,
    is_exact_ptr,
    x_row,
    x_column,
    part_stride,
    part_row,
    num_columns,
    NUM_PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    source = x_ptr + row * x_row + columns * x_column
    rest = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    for index in tl.static_range(NUM_PARTS):
        part = rest.to(tl.bfloat16)
        target = parts_ptr + (NUM_PARTS - 1 - index) * part_stride + row * part_row + columns
        tl.store(target, part, mask=mask)
        rest = rest - part.to(tl.float32)
    # NaN, where something was not finite, is not 0 either.
    if tl.max((rest != 0.0).to(tl.int32), 0) > 0:
        tl.store(is_exact_ptr, 0)


def launch_split(x: Tensor, parts: Tensor) -> Tensor:
    """As `split_`, of a CUDA matrix that is not empty."""
    is_exact = torch.ones((), dtype=torch.int8, device=x.device)
    num_rows, num_columns = x.shape
    sizes = (*x.stride(), parts.stride(0), parts.stride(1), num_columns)
    _launcher()(
        (num_rows, ceil_div(num_columns, _BLOCK), 1),
        (x, parts, is_exact, *sizes),
        (len(parts), _BLOCK),
        num_warps=_NUM_WARPS,
    )
    return is_exact.bool()


@cache
def _launcher() -> Launcher:
    return Launcher(_split_kernel)
