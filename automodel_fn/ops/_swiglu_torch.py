"""`swiglu` by torch's own operators."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

# From so many numbers on, what is widened is read from memory again; of pieces it is in the caches.
_LARGE = 2**22
_PIECE = 2**20
_WIDE = (torch.float32, torch.float64)


def composed(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, of operators that can be differentiated, mapped, sharded and exported.

    Example:
        >>> composed(torch.tensor([1.0]), torch.tensor([2.0]))
        tensor([1.4621])
    """
    return (functional.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def in_place(gate: Tensor, up: Tensor) -> Tensor:
    """The bits of `composed`, in less memory: what is widened or multiplied is overwritten.

    Example:
        >>> in_place(torch.tensor([1.0]), torch.tensor([2.0]))
        tensor([1.4621])
    """
    pieces = None if gate.dtype in _WIDE else _in_pieces(gate, up, num_outputs=1, num_scratch=1)
    if pieces is None:
        wide = _wide(gate)
        return functional.silu(wide, inplace=wide is not gate).mul_(up).to(gate.dtype)
    for (of_gate, of_up, of_out), (wide,) in pieces.rows:
        of_out.copy_(functional.silu(wide.copy_(of_gate), inplace=True).mul_(of_up))
    return pieces.outputs[0]


def gradients(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of both, of operators that can be differentiated again.

    Example:
        >>> gradients(torch.ones(1), torch.zeros(1), torch.ones(1))
        (tensor([0.5000]), tensor([0.]))
    """
    dtype, gate, dy = gate.dtype, _wide(gate), _wide(dy)
    sigmoid = torch.sigmoid(gate)
    slope = sigmoid * (1 + gate * (1 - sigmoid))
    return (dy * _wide(up) * slope).to(dtype), (dy * gate * sigmoid).to(dtype)


def gradients_in_place(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """What `gradients` gives, up to a rounding in float32, in less memory.

    Example:
        >>> gradients_in_place(torch.ones(1), torch.zeros(1), torch.ones(1))
        (tensor([0.5000]), tensor([0.]))
    """
    pieces = _in_pieces(dy, gate, up, num_outputs=2, num_scratch=3)
    if pieces is None:
        wide, grad = _wide(gate), _wide(dy)
        dup = functional.silu(wide).mul_(grad).to(gate.dtype)
        inner = grad * up if grad is dy else grad.mul_(up)
        return torch.ops.aten.silu_backward(inner, wide).to(gate.dtype), dup
    for (of_dy, of_gate, of_up, of_dgate, of_dup), (grad, wide, found) in pieces.rows:
        grad, wide = _widened(of_dy, grad), _widened(of_gate, wide)
        torch.ops.aten.silu.out(wide, out=found)
        of_dup.copy_(found.mul_(grad))
        torch.mul(grad, of_up, out=found)
        torch.ops.aten.silu_backward.grad_input(found, wide, grad_input=found)
        of_dgate.copy_(found)
    dgate, dup = pieces.outputs
    return dgate, dup


class _Pieces(NamedTuple):
    """New tensors, and some rows at a time of inputs and of these, with wide memory for as many."""

    outputs: tuple[Tensor, ...]
    rows: Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]


def _in_pieces(*inputs: Tensor, num_outputs: int, num_scratch: int) -> _Pieces | None:
    """None where there are few rows, or where they are no views."""
    first = inputs[0]
    if first.numel() < _LARGE:
        return None
    length = first.shape[-1]
    outputs = tuple(first.new_empty(first.shape) for _ in range(num_outputs))
    try:
        rows = [tensor.view(-1, length) for tensor in (*inputs, *outputs)]
    except RuntimeError:
        return None
    num_rows = max(1, _PIECE // length)
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    scratch = torch.empty(num_scratch, num_rows, length, dtype=dtype).unbind()
    pieces = zip(*(tensor.split(num_rows) for tensor in rows), strict=True)
    return _Pieces(
        outputs,
        rows=((piece, tuple(memory[: len(piece[0])] for memory in scratch)) for piece in pieces),
    )


def _widened(tensor: Tensor, memory: Tensor) -> Tensor:
    return tensor if tensor.dtype in _WIDE else memory.copy_(tensor)


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
