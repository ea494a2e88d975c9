"""The kernels of sums over tokens' rows. Imports Triton: to be imported where a CUDA tensor is."""
# Triton is in no build of torch for the CPU, and what its language returns is not typed.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from automodel_fn.ops._launch import Launcher, ceil_div
from automodel_fn.ops._rows import rows_of

_LARGEST_BLOCK = 2048


@triton.jit
def _sums_kernel(
    rows_ptr,
    weights_ptr,
    places_ptr,
    sums_ptr,
    row_stride,
    num_columns,
    num_blocks,
    K: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    token = program // num_blocks
    columns = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    total = tl.zeros((BLOCK,), tl.float32)
    for index in range(K):
        place = tl.load(places_ptr + token * K + index)
        row = tl.load(rows_ptr + place * row_stride + columns, mask=mask, other=0.0)
        row = row.to(tl.float32)
        if weights_ptr is not None:
            row = row * tl.load(weights_ptr + token * K + index).to(tl.float32)
        total += row
    total = total.to(sums_ptr.dtype.element_ty)
    tl.store(sums_ptr + token * num_columns + columns, total, mask=mask)


@triton.jit
def _gradients_kernel(
    dy_ptr,
    rows_ptr,
    weights_ptr,
    places_ptr,
    drows_ptr,
    dweights_ptr,
    dy_stride,
    row_stride,
    K: tl.constexpr,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # One program a token and expert: all that it needs of a row is read once.
    program = tl.program_id(0).to(tl.int64)
    token = program // K
    place = tl.load(places_ptr + program)
    weight = tl.load(weights_ptr + program).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, HIDDEN, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < HIDDEN
        dy = tl.load(dy_ptr + token * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
        if drows_ptr is not None:
            drow = (dy * weight).to(drows_ptr.dtype.element_ty)
            tl.store(drows_ptr + place * HIDDEN + columns, drow, mask=mask)
        if dweights_ptr is not None:
            row = tl.load(rows_ptr + place * row_stride + columns, mask=mask, other=0.0)
            total += dy * row.to(tl.float32)
    if dweights_ptr is not None:
        tl.store(dweights_ptr + program, tl.sum(total, 0).to(dweights_ptr.dtype.element_ty))


_launch_sums = Launcher(_sums_kernel)
_launch_gradients = Launcher(_gradients_kernel)


def weighted_sums(
    rows: Tensor, weights: Tensor | None, places: Tensor, dtype: torch.dtype
) -> Tensor:
    """The sums of each token's rows, as by torch's operators."""
    num_tokens, top_k = places.shape
    columns = rows.shape[1]
    sums = rows.new_empty((num_tokens, columns), dtype=dtype)
    if sums.numel():
        rows, stride = rows_of(rows, columns)
        block = _block(columns)
        blocks = ceil_div(columns, block)
        weights = None if weights is None else weights.contiguous()
        _launch_sums(
            (num_tokens * blocks, 1, 1),
            (rows, weights, places.contiguous(), sums, stride, columns, blocks),
            (top_k, block),
            num_warps=_warps(block),
        )
    return sums


def gradients(
    dy: Tensor, rows: Tensor, weights: Tensor, places: Tensor, needed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of the rows and of the weights, as by torch's operators."""
    columns, num_places = rows.shape[1], places.numel()
    # What fills experts up is nobody's place.
    new_rows = rows.new_empty if len(rows) == num_places else rows.new_zeros
    drows = new_rows(rows.shape) if needed[0] else None
    dweights = weights.new_empty(weights.shape) if needed[1] else None
    if num_places and columns:
        dy, dy_stride = rows_of(dy, columns)
        rows, stride = rows_of(rows, columns)
        block = _block(columns)
        _launch_gradients(
            (num_places, 1, 1),
            (
                dy,
                rows,
                weights.contiguous(),
                places.contiguous(),
                drows,
                dweights,
                dy_stride,
                stride,
            ),
            (places.shape[1], columns, block),
            num_warps=_warps(block),
        )
    return drows, dweights


def _block(columns: int) -> int:
    return min(_LARGEST_BLOCK, max(64, 1 << (columns - 1).bit_length()))


def _warps(block: int) -> int:
    # 8 elements a thread: 16 bytes of bf16.
    return min(8, max(1, block // 256))
