"""Into which steps a cast is divided: fast, and with little memory beside the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from automodel_fn.cast._convert import LARGE

_MIN_STEPS = 64
"""Into how many steps a model of small tensors is divided at least."""
_WINDOW = 512 << 20
"""Bytes that a GPU's kernels are given at once, where earlier steps have freed as many."""
_SMALL_PART = 0.01
"""How much of a model a cast may take on a GPU besides its largest tensor."""


def limit_of_steps(sizes: Sequence[int]) -> int:
    """How much a step of small tensors takes: as the largest, or a small part of the model."""
    return min(LARGE, max(max(sizes, default=0), sum(sizes) // _MIN_STEPS))


def ends_of_steps(
    sizes: Sequence[int], limit: int, tensor: torch.Tensor, to_dtype: torch.dtype
) -> tuple[int, ...]:
    """Where the steps end, none of which takes more than the largest tensor and what is free.

    A large tensor is a step of its own on a CPU. On a GPU the end of a kernel leaves it half idle
    unless the next one runs already: there a step takes several, at first as many as a small part
    of the model, and more as soon as earlier ones have freed the memory that it needs.
    """
    is_on_gpu = tensor.is_cuda
    bytes_before_per_byte = tensor.dtype.itemsize / to_dtype.itemsize
    freed_per_byte = bytes_before_per_byte - 1
    free = max(sizes) + sum(sizes) * bytes_before_per_byte * _SMALL_PART
    ends: list[int] = []
    filled, freed = 0, 0.0
    for place, size in enumerate(sizes):
        room = min(free + freed, _WINDOW) if is_on_gpu and size >= LARGE else limit
        if filled and filled + size > room:
            ends.append(place)
            freed += max(0.0, filled * freed_per_byte)
            filled = 0
        filled += size
    return (*ends, len(sizes))
