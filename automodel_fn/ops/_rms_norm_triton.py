"""The kernels of `rms_norm_fp32`. Imports Triton: to be imported where a CUDA tensor comes in."""
# Triton is in no build of torch for the CPU, and what its language returns is not typed.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

from functools import cache

import attrs
import torch
import triton
import triton.language as tl
from torch import Tensor

from automodel_fn.ops._launch import Launcher


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
    STAGES: tl.constexpr,
):
    columns = tl.arange(0, BLOCK)[None, :]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < HIDDEN, other=0.0).to(tl.float32)
    dweight = tl.zeros([ROWS, BLOCK], tl.float32)
    num_tiles = tl.cdiv(num_rows, ROWS)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=STAGES):
        rows = (tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        is_row = rows < num_rows
        mask = is_row & (columns < HIDDEN)
        x = tl.load(x_ptr + rows * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + rows * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if dsum_ptr is not None:
            dsum = tl.load(dsum_ptr + rows * dsum_stride + columns, mask=mask, other=0.0)
        inner = dy
        if weight_ptr is not None:
            inner = dy * weight
        # The norm of a row is found again, since x is at hand: nothing is saved but the inputs.
        mean = tl.sum(x * x, 1, keep_dims=True) / HIDDEN
        scale = tl.div_rn(1.0, tl.sqrt_rn(mean + eps))
        # With eps 0, what stands for rows beyond the last would be NaN, and dweight with it.
        scale = tl.where(is_row, scale, 0.0)
        normalized = x * scale
        slope = tl.sum(inner * x, 1, keep_dims=True) * scale / HIDDEN
        dx = scale * (inner - normalized * slope)
        if dsum_ptr is not None:
            dx += dsum.to(tl.float32)
        tl.store(dx_ptr + rows * HIDDEN + columns, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if parts_ptr is not None:
            if ROUNDS_FIRST:
                normalized = normalized.to(x_ptr.dtype.element_ty).to(tl.float32)
            dweight += dy * normalized
    if parts_ptr is not None:
        part = tl.sum(dweight, 0, keep_dims=True)
        offset = tl.program_id(0).to(tl.int64) * HIDDEN
        tl.store(parts_ptr + offset + columns, part, mask=columns < HIDDEN)


@triton.jit
def _sum_kernel(
    parts_ptr, total_ptr, num_parts, HIDDEN: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for start in range(0, num_parts, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        mask = (rows < num_parts) & (columns < HIDDEN)
        total += tl.load(parts_ptr + rows * HIDDEN + columns, mask=mask, other=0.0)
    found = tl.sum(total, 0, keep_dims=True).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + columns, found, mask=columns < HIDDEN)


_launch_forward = Launcher(_forward_kernel)
_launch_backward = Launcher(_backward_kernel)
_launch_sum = Launcher(_sum_kernel)


@attrs.frozen
class Tile:
    """What one program holds in registers at once: whole rows.

    Args:
        rows: Their number, a power of 2.
        block: The hidden size, rounded up to a power of 2.
        num_warps: Warps that share it.
    """

    rows: int
    block: int = attrs.field(kw_only=True)
    num_warps: int = attrs.field(kw_only=True)


@cache
def tile_for(hidden: int) -> Tile:
    """The tile of a hidden size: about 4096 elements, of one row at least."""
    block = triton.next_power_of_2(hidden)
    rows = max(1, 4096 // block)
    return Tile(rows, block=block, num_warps=min(32, max(4, rows * block // 512)))


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, rounds_first: bool
) -> tuple[Tensor, Tensor | None]:
    """The norm, contiguous, and what it is of where a residual is given."""
    hidden = x.shape[-1]
    y = _contiguous_like(x)
    total = None if residual is None else _contiguous_like(x)
    num_rows = x.numel() // hidden if hidden else 0
    if num_rows:
        tile = tile_for(hidden)
        x, x_stride = _rows(x, hidden)
        residual, residual_stride = (None, 0) if residual is None else _rows(residual, hidden)
        _launch_forward(
            (triton.cdiv(num_rows, tile.rows), 1, 1),
            (x, residual, weight, y, total, x_stride, residual_stride, num_rows, float(eps)),
            (hidden, tile.rows, tile.block, rounds_first),
            num_warps=tile.num_warps,
        )
    return y, total


def backward(
    x: Tensor,
    weight: Tensor | None,
    dy: Tensor,
    dsum: Tensor | None,
    eps: float,
    rounds_first: bool,
    *,
    of_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradients of what was normalised, which takes up `dsum`, and of the weight if wanted.

    The gradient of the weight is summed by each program over its rows, then over the programs, in
    an order that depends on the shape and the device only.
    """
    hidden = x.shape[-1]
    dx = _contiguous_like(x)
    dweight = torch.empty_like(weight) if of_weight and weight is not None else None
    num_rows = x.numel() // hidden if hidden else 0
    if not num_rows:
        return dx, None if dweight is None else dweight.zero_()
    tile = tile_for(hidden)
    num_parts = min(triton.cdiv(num_rows, tile.rows), num_programs(x.get_device()))
    parts = None
    if dweight is not None:
        parts = torch.empty((num_parts, hidden), dtype=torch.float32, device=x.device)
    x, x_stride = _rows(x, hidden)
    dy, dy_stride = _rows(dy, hidden)
    dsum, dsum_stride = (None, 0) if dsum is None else _rows(dsum, hidden)
    _launch_backward(
        (num_parts, 1, 1),
        (x, weight, dy, dsum, dx, parts, x_stride, dy_stride, dsum_stride, num_rows, float(eps)),
        (hidden, tile.rows, tile.block, rounds_first, 1),
        num_warps=tile.num_warps,
    )
    if parts is not None and dweight is not None:
        _launch_sum(
            (triton.cdiv(hidden, 32), 1, 1),
            (parts, dweight, num_parts),
            (hidden, 64, 32),
            num_warps=4,
        )
    return dx, dweight


@cache
def num_programs(index: int) -> int:
    """How many programs of the backward pass a device holds at once."""
    if index < 0:
        return 4
    return 2 * torch.cuda.get_device_properties(index).multi_processor_count


def _contiguous_like(x: Tensor) -> Tensor:
    # The quicker of two ways; a new tensor must not have the gaps or the order of a strided one.
    return torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)


def _rows(tensor: Tensor, hidden: int) -> tuple[Tensor, int]:
    if tensor.is_contiguous():
        return tensor, hidden
    rows = tensor.reshape(-1, hidden)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)
