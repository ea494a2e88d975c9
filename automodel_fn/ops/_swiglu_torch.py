"""`swiglu` by torch's own operators."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional

# Memory of so many is used again while it is there; with fewer, threads wait for each other more.
_NUMBERS_OF_A_THREAD = 2**19


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
    if gate.dtype in (torch.float32, torch.float64):
        return functional.silu(gate).mul_(up)
    if gate.numel() <= _numbers_at_once():
        return functional.silu(gate.float(), inplace=True).mul_(up).to(gate.dtype)
    out = torch.empty_like(gate)
    for (of_gate, of_up, of_out), (wide, factor) in _pieces((gate, up, out), num_scratch=2):
        functional.silu(wide.copy_(of_gate), inplace=True)
        of_out.copy_(wide.mul_(factor.copy_(of_up)))
    return out


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
    dgate, dup = torch.empty_like(gate), torch.empty_like(up)
    for inputs, (wide, sigmoid, product) in _pieces((dy, gate, up, dgate, dup), num_scratch=3):
        of_dy, of_gate, of_up, of_dgate, of_dup = inputs
        torch.sigmoid(wide.copy_(of_gate), out=sigmoid)
        torch.mul(wide, sigmoid, out=product)
        slope = wide.sub_(product).add_(1).mul_(sigmoid)
        of_dup.copy_(product.mul_(of_dy))
        of_dgate.copy_(product.copy_(of_dy).mul_(of_up).mul_(slope))
    return dgate, dup


def _pieces(
    tensors: tuple[Tensor, ...], *, num_scratch: int
) -> Iterator[tuple[tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """Views of some rows of each tensor at a time, and wide memory for them, the same each time."""
    # Where the rows are no view, the whole is one piece.
    first = tensors[1]
    dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
    rows = _in_rows(tensors) if first.numel() > _numbers_at_once() else None
    if rows is None:
        yield tensors, tuple(torch.empty_like(first, dtype=dtype) for _ in range(num_scratch))
        return
    num_rows = max(1, _numbers_at_once() // rows[0].shape[1])
    scratch = torch.empty(num_scratch, num_rows, rows[0].shape[1], dtype=dtype).unbind()
    for piece in zip(*(tensor.split(num_rows) for tensor in rows), strict=True):
        yield piece, tuple(memory[: len(piece[0])] for memory in scratch)


def _in_rows(tensors: tuple[Tensor, ...]) -> list[Tensor] | None:
    try:
        return [tensor.view(-1, tensor.shape[-1]) for tensor in tensors]
    except RuntimeError:
        return None


def _numbers_at_once() -> int:
    return _NUMBERS_OF_A_THREAD * torch.get_num_threads()


def _wide(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
