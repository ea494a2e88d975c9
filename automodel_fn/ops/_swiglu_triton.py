"""The kernels of `swiglu`. Imports Triton: to be imported where a CUDA tensor comes in."""
# Triton is in no build of torch for the CPU, and what its language returns is not typed.
# pyright: basic, reportMissingImports=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from automodel_fn.ops._launch import Launcher, ceil_div
from automodel_fn.ops._rows import contiguous_like, rows_of

_BLOCK = 2048
_WARPS = 8


@triton.jit
def _exp(x):
    # The instruction is an exp2 of x times log2(e); what that product loses grows with x, and is
    # put back here: log2(e) is 1.442695 and 1.925963e-8 more than its float32.
    high = x * 1.4426950216293335
    low = tl.fma(x, 1.4426950216293335, -high) + x * 1.925963033500e-8
    low = tl.where(tl.abs(x) < 256.0, low, 0.0)
    return tl.exp2(high) * (1.0 + low * 0.6931471805599453)


@triton.jit
def _forward_kernel(
    gate_ptr, up_ptr, y_ptr, gate_stride, up_stride, num_columns, num_blocks, BLOCK: tl.constexpr
):
    program = tl.program_id(0).to(tl.int64)
    row = program // num_blocks
    columns = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    y = gate / (1.0 + _exp(-gate)) * up
    tl.store(y_ptr + row * num_columns + columns, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(
    dy_ptr,
    gate_ptr,
    up_ptr,
    dgate_ptr,
    dup_ptr,
    dy_stride,
    gate_stride,
    up_stride,
    dgate_stride,
    dup_stride,
    num_columns,
    num_blocks,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    row = program // num_blocks
    columns = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < num_columns
    dy = tl.load(dy_ptr + row * dy_stride + columns, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + _exp(-gate))
    dup = dy * gate * sigmoid
    dup = dup.to(dup_ptr.dtype.element_ty)
    tl.store(dup_ptr + row * dup_stride + columns, dup, mask=mask)
    dgate = dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
    dgate = dgate.to(dgate_ptr.dtype.element_ty)
    tl.store(dgate_ptr + row * dgate_stride + columns, dgate, mask=mask)


_launch_forward = Launcher(_forward_kernel)
_launch_backward = Launcher(_backward_kernel)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, contiguous."""
    y = contiguous_like(gate)
    if y.numel():
        (gate, up), strides, columns, blocks, programs = _laid_out(gate, up)
        _launch_forward(
            (programs, 1, 1),
            (gate, up, y, *strides, columns, blocks),
            (_BLOCK,),
            num_warps=_WARPS,
        )
    return y


def backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of the gate and of what it multiplies, both contiguous."""
    dgate, dup = contiguous_like(gate), contiguous_like(up)
    _fill(dy, gate, up, dgate, dup)
    return dgate, dup


def backward_packed(dy: Tensor, packed: Tensor) -> Tensor:
    """The gradient of a packed projection, whose first half is the gate; contiguous."""
    dpacked = contiguous_like(packed)
    _fill(dy, *packed.chunk(2, dim=-1), *dpacked.chunk(2, dim=-1))
    return dpacked


def _fill(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor) -> None:
    # The halves of a new tensor are rows with gaps: they are laid out without a copy.
    if dgate.numel():
        tensors, strides, columns, blocks, programs = _laid_out(dy, gate, up, dgate, dup)
        _launch_backward(
            (programs, 1, 1),
            (*tensors, *strides, columns, blocks),
            (_BLOCK,),
            num_warps=_WARPS,
        )


def _laid_out(
    *tensors: Tensor,
) -> tuple[tuple[Tensor, ...], tuple[int, ...], int, int, int]:
    # Tensors, the strides of their rows, columns, blocks of a row, blocks of all rows. Contiguous
    # ones are a single row; halves of a packed projection are rows with gaps between them.
    if all(tensor.is_contiguous() for tensor in tensors):
        columns = tensors[0].numel()
        blocks = ceil_div(columns, _BLOCK)
        return tensors, (columns,) * len(tensors), columns, blocks, blocks
    columns = tensors[0].shape[-1]
    rows, strides = zip(*(rows_of(tensor, columns) for tensor in tensors), strict=True)
    blocks = ceil_div(columns, _BLOCK)
    return rows, strides, columns, blocks, blocks * (tensors[0].numel() // columns)
