"""How kernels see tensors: as rows in memory, each without gaps."""

from __future__ import annotations

import torch
from torch import Tensor


def contiguous_like(tensor: Tensor) -> Tensor:
    """A new tensor of the same shape, dtype and device, contiguous, not filled.

    Example:
        >>> contiguous_like(torch.ones(2, 3).T).stride()
        (2, 1)
    """
    # The quicker of two ways; a new tensor must not have the gaps or the order of a strided one.
    return torch.empty_like(tensor) if tensor.is_contiguous() else tensor.new_empty(tensor.shape)


def rows_of(tensor: Tensor, length: int) -> tuple[Tensor, int]:
    """A tensor with the rows of the given one, and the stride from row to row. Copies if it must.

    Args:
        tensor: `[..., length]`, not empty.
        length: Of its last dimension.

    Example:
        >>> rows, stride = rows_of(torch.ones(4, 6)[:, :3], 3)
        >>> rows.shape, stride
        (torch.Size([4, 3]), 6)
    """
    if tensor.is_contiguous():
        return tensor, length
    rows = tensor.reshape(-1, length)
    rows = rows if rows.stride(1) == 1 else rows.contiguous()
    return rows, rows.stride(0)
