"""The kernels of `rms_norm_fp32`. Imports Triton: to be imported where a CUDA tensor comes in."""
# Triton is in no build of torch for the CPU, and what its language returns is not typed.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from collections.abc import Hashable

import torch
import triton
import triton.language as tl
from torch import Tensor

from automodel_fn.ops import _rms_norm_wide_triton as wide
from automodel_fn.ops._launch import Launcher, Relaunch, ceil_div, num_processors
from automodel_fn.ops._parts_triton import add_up, new_parts
from automodel_fn.ops._rms_norm_tiles import LARGEST, tile_for
from automodel_fn.ops._rows import contiguous_like, rows_of


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
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    mask = (rows < num_rows) & (columns < HIDDEN)
    x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + rows * residual_stride + columns, mask=mask, other=0.0)
        x = (x.to(tl.float32) + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + rows * HIDDEN + columns, x, mask=mask)
    x = x.to(tl.float32)
    mean = tl.sum(x * x, 1, keep_dims=True) / HIDDEN
    y = x * tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < HIDDEN, other=0.0)
        if ROUNDS_FIRST:
            y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
        y = y * weight.to(tl.float32)
    tl.store(y_ptr + rows * HIDDEN + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def add_pairs(left0, left1, right0, right1):
    """Two sums in one reduction: half as many barriers."""
    return left0 + right0, left1 + right1


@triton.jit
def _backward_kernel(
    x_ptr,
    weight_ptr,
    dy_ptr,
    dsum_ptr,
    dx_ptr,
    parts_ptr,
    x_stride,
    dy_stride,
    dsum_stride,
    num_rows,
    eps,
    HIDDEN: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    ROUNDS_FIRST: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)[None, :]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < HIDDEN, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    step = tl.num_programs(0)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    mask = (rows < num_rows) & (columns < HIDDEN)
    next_x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0)
    next_dy = tl.load(dy_ptr + rows * dy_stride + columns, mask=mask, other=0.0)
    for _ in range(tl.program_id(0), tl.cdiv(num_rows, ROWS), step):
        x, dy = next_x.to(tl.float32), next_dy.to(tl.float32)
        if dsum_ptr is not None:
            dsum = tl.load(dsum_ptr + rows * dsum_stride + columns, mask=mask, other=0.0)
        is_row, place, here = rows < num_rows, rows * HIDDEN + columns, mask
        # The next rows are on their way while these are computed.
        rows += step * ROWS
        mask = (rows < num_rows) & (columns < HIDDEN)
        next_x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0)
        next_dy = tl.load(dy_ptr + rows * dy_stride + columns, mask=mask, other=0.0)
        inner = dy
        if weight_ptr is not None:
            inner = dy * weight
        # The norm of a row is found again, since x is at hand: nothing is saved but the inputs.
        squares, products = tl.reduce((x * x, inner * x), 1, add_pairs, keep_dims=True)
        scale = tl.div_rn(1.0, tl.sqrt_rn(squares / HIDDEN + eps))
        # With eps 0, what stands for rows beyond the last would be NaN, and dweight with it.
        scale = tl.where(is_row, scale, 0.0)
        normalized = x * scale
        dx = scale * (inner - normalized * (products * scale / HIDDEN))
        if dsum_ptr is not None:
            dx += dsum.to(tl.float32)
        tl.store(dx_ptr + place, dx.to(dx_ptr.dtype.element_ty), mask=here)
        if parts_ptr is not None:
            if ROUNDS_FIRST:
                normalized = normalized.to(x_ptr.dtype.element_ty).to(tl.float32)
            dweight += dy * normalized
    if parts_ptr is not None:
        part = tl.sum(dweight, 0, keep_dims=True)
        offset = tl.program_id(0).to(tl.int64) * HIDDEN
        tl.store(parts_ptr + offset + columns, part, mask=columns < HIDDEN)


_launch_forward = Launcher(_forward_kernel)
_launch_backward = Launcher(_backward_kernel)


forward_again = _launch_forward.again


def forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    eps: float,
    rounds_first: bool,
    alike: Hashable = None,
    again: Relaunch | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The norm, contiguous; where a residual is given, that and what it is the norm of.

    Args:
        x: `[..., H]`.
        residual: None or `[..., H]`.
        weight: None or `[H]`.
        eps: Added to the mean of the squares.
        rounds_first: Whether the normalised is rounded before the weight multiplies it.
        alike: What `forward_again` is to find this by: see `Launcher`. Tensors have no gaps.
        again: What it found for these tensors.
    """
    y = contiguous_like(x)
    total = None if residual is None else contiguous_like(x)
    if y.numel() and (again is None or not again(x, residual, weight, y, total)):
        _forward(x, residual, weight, y, total, float(eps), rounds_first, alike)
    return y if total is None else (y, total)


def _forward(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    y: Tensor,
    total: Tensor | None,
    eps: float,
    rounds_first: bool,
    alike: Hashable,
) -> None:
    hidden = x.shape[-1]
    num_rows = x.numel() // hidden
    x, x_stride = rows_of(x, hidden)
    residual, residual_stride = (None, 0) if residual is None else rows_of(residual, hidden)
    weight = None if weight is None else weight.contiguous()
    arguments = (x, residual, weight, y, total, x_stride, residual_stride, num_rows, eps)
    if hidden > LARGEST:
        wide.forward(arguments, num_rows, hidden, rounds_first)
        return
    tile = tile_for(hidden)
    grid = (ceil_div(num_rows, tile.rows), 1, 1)
    constants = (hidden, tile.rows, tile.block, rounds_first)
    _launch_forward(grid, arguments, constants, num_warps=tile.forward_warps, alike=alike)


def backward(
    x: Tensor,
    weight: Tensor | None,
    dy: Tensor,
    dsum: Tensor | None,
    eps: float,
    rounds_first: bool,
    *,
    of_weight: bool,
    again: Relaunch | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of what was normalised, which takes up `dsum`, and of the weight if wanted.

    The gradient of the weight is summed by each program over its rows, then over the programs, in
    an order that depends on the shape and the device only. All but the gradients that come in
    follows from `again`, if the forward was given one.
    """
    hidden = x.shape[-1]
    dx = contiguous_like(x)
    dweight = torch.empty_like(weight) if of_weight and weight is not None else None
    if not dx.numel():
        return dx, None if dweight is None else dweight.zero_()
    num_rows = x.numel() // hidden
    x, x_stride = rows_of(x, hidden)
    dy, dy_stride = rows_of(dy, hidden)
    dsum, dsum_stride = (None, 0) if dsum is None else rows_of(dsum, hidden)
    weight = None if weight is None else weight.contiguous()
    numbers = (x_stride, dy_stride, dsum_stride, num_rows, float(eps))
    if hidden > LARGEST:
        wide.backward((x, weight, dy, dsum, dx), numbers, rounds_first, dweight)
        return dx, dweight
    tile = tile_for(hidden)
    most = tile.programs * num_processors(dx.get_device())
    num_parts = min(most, ceil_div(num_rows, tile.rows))
    parts = None if dweight is None else new_parts(dweight, num_parts)
    incoming = (dy.dtype, dy_stride, None if dsum is None else dsum.dtype, dsum_stride)
    alike = None if again is None else (again, *incoming, of_weight)
    relaunch = _launch_backward.again(alike)
    tensors = (x, weight, dy, dsum, dx, parts)
    if relaunch is None or not relaunch(*tensors):
        constants = (hidden, tile.rows, tile.block, rounds_first)
        _launch_backward(
            (num_parts, 1, 1),
            (*tensors, *numbers),
            constants,
            num_warps=tile.num_warps,
            alike=alike,
        )
    if parts is not None and dweight is not None:
        add_up(parts, dweight, alike)
    return dx, dweight
