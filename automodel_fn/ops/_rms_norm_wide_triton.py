"""The kernels of `rms_norm_fp32` for rows that registers cannot hold: in chunks, read twice."""
# Triton is in no build of torch for the CPU, and what its language returns is not typed.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from automodel_fn.ops._launch import Launcher, ceil_div, num_processors
from automodel_fn.ops._parts_triton import add_up, new_parts

_CHUNK = 4096
_WARPS = 8
# Of the kernel that sums over rows: its tile, and how many programs share a column.
_ROWS, _BLOCK = 16, 128


@triton.jit
def _row_of(x_ptr, residual_ptr, sum_ptr, columns, mask):
    x = tl.load(x_ptr + columns, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + columns, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
    return x


@triton.jit
def _forward_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    sum_ptr,
    x_stride,
    residual_stride,
    num_rows,
    eps,
    HIDDEN: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * x_stride
    if residual_ptr is not None:
        residual_ptr += row * residual_stride
    squares = tl.zeros([CHUNK], tl.float32)
    for start in range(0, HIDDEN, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        mask = columns < HIDDEN
        x = _row_of(x_ptr, residual_ptr, sum_ptr, columns, mask).to(tl.float32)
        squares += x * x
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 0) / HIDDEN + eps))
    for start in range(0, HIDDEN, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        mask = columns < HIDDEN
        x = _row_of(x_ptr, residual_ptr, sum_ptr, columns, mask)
        if residual_ptr is not None:
            tl.store(sum_ptr + row * HIDDEN + columns, x, mask=mask)
        y = x.to(tl.float32) * scale
        if weight_ptr is not None:
            if ROUNDS_FIRST:
                y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
            y = y * tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        tl.store(y_ptr + row * HIDDEN + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    x_ptr,
    weight_ptr,
    dy_ptr,
    dsum_ptr,
    dx_ptr,
    scale_ptr,
    x_stride,
    dy_stride,
    dsum_stride,
    num_rows,
    eps,
    HIDDEN: tl.constexpr,
    CHUNK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    squares = tl.zeros([CHUNK], tl.float32)
    products = tl.zeros([CHUNK], tl.float32)
    for start in range(0, HIDDEN, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        mask = columns < HIDDEN
        x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        inner = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            inner *= tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        squares += x * x
        products += inner * x
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(squares, 0) / HIDDEN + eps))
    slope = tl.sum(products, 0) * scale / HIDDEN
    tl.store(scale_ptr + row, scale)
    for start in range(0, HIDDEN, CHUNK):
        columns = start + tl.arange(0, CHUNK)
        mask = columns < HIDDEN
        x = tl.load(x_ptr + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        inner = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if weight_ptr is not None:
            inner *= tl.load(weight_ptr + columns, mask=mask, other=0.0).to(tl.float32)
        dx = scale * (inner - x * scale * slope)
        if dsum_ptr is not None:
            dx += tl.load(dsum_ptr + row * dsum_stride + columns, mask=mask, other=0.0)
        tl.store(dx_ptr + row * HIDDEN + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weight_kernel(
    x_ptr,
    dy_ptr,
    scale_ptr,
    parts_ptr,
    x_stride,
    dy_stride,
    num_rows,
    HIDDEN: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    for tile in range(tl.program_id(1), tl.cdiv(num_rows, ROWS), tl.num_programs(1)):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (rows < num_rows) & (columns < HIDDEN)
        x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        normalized = x * tl.load(scale_ptr + rows, mask=rows < num_rows, other=0.0)
        if ROUNDS_FIRST:
            normalized = normalized.to(x_ptr.dtype.element_ty).to(tl.float32)
        dweight += dy * normalized
    part = tl.sum(dweight, 0, keep_dims=True)
    offset = tl.program_id(1).to(tl.int64) * HIDDEN
    tl.store(parts_ptr + offset + columns, part, mask=columns < HIDDEN)


_launch_forward = Launcher(_forward_kernel)
_launch_backward = Launcher(_backward_kernel)
_launch_weight = Launcher(_weight_kernel)


def forward(arguments: tuple[Any, ...], num_rows: int, hidden: int, rounds_first: bool) -> None:
    """Fill the norm, and the sum if there is one; `arguments` are those of the kernel."""
    _launch_forward((num_rows, 1, 1), arguments, (hidden, rounds_first, _CHUNK), num_warps=_WARPS)


def backward(
    tensors: tuple[Any, ...],
    numbers: tuple[Any, ...],
    rounds_first: bool,
    dweight: Tensor | None,
) -> None:
    """Fill the gradients.

    Args:
        tensors: x, weight, dy, dsum, dx; a weight and dsum may be None.
        numbers: The strides of the rows of x, dy and dsum, the number of rows, eps.
        rounds_first: Whether the weight multiplied what was rounded.
        dweight: The gradient of the weight, if it is wanted.
    """
    x, _, dy, _, dx = tensors
    x_stride, dy_stride, _, num_rows, _ = numbers
    hidden = dx.shape[-1]
    scale = torch.empty(num_rows, dtype=torch.float32, device=dx.device)
    _launch_backward(
        (num_rows, 1, 1), (*tensors, scale, *numbers), (hidden, _CHUNK), num_warps=_WARPS
    )
    if dweight is None:
        return
    num_columns = ceil_div(hidden, _BLOCK)
    most = max(1, 8 * num_processors(dx.get_device()) // num_columns)
    parts = new_parts(dweight, min(most, ceil_div(num_rows, _ROWS)))
    _launch_weight(
        (num_columns, parts.shape[0], 1),
        (x, dy, scale, parts, x_stride, dy_stride, num_rows),
        (hidden, rounds_first, _ROWS, _BLOCK),
        num_warps=4,
    )
    add_up(parts, dweight)
