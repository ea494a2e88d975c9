"""Tensors in another dtype, bit for bit as `tensor.to(dtype)` makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from operator import methodcaller

import torch

from automodel_fn.cast._dtensors import is_plain, local, rewrapped

LARGE = 8 << 20
"""Bytes from which on a tensor is worth a kernel of its own."""

# The same as `tensor.to(dtype)`, with less to parse: that is a third of a small tensor's cast.
_TO_DTYPE: dict[torch.dtype, Callable[[torch.Tensor], torch.Tensor]] = {
    torch.float32: torch.Tensor.float,
    torch.bfloat16: torch.Tensor.bfloat16,
    torch.float16: torch.Tensor.half,
}


def converted(tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Each tensor in `dtype`, in a storage of its own; gradients are off, or it needs none."""
    if not {torch.Tensor, torch.nn.Parameter}.issuperset(map(type, tensors)):
        return tuple(tensor.detach().to(dtype) for tensor in tensors)
    if tensors[0].is_cuda and len(tensors) > 1 and tensors[0].layout is torch.strided:
        is_large = tensors[0].numel() * dtype.itemsize >= LARGE
        return converted_at_once(tensors, dtype) if is_large else converted_together(tensors, dtype)
    return tuple(map(_to(dtype), tensors))


def _to(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return _TO_DTYPE.get(dtype) or methodcaller("to", dtype)


def converted_together(
    tensors: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """The same in two calls, where a launch for each tensor would take longer than its cast."""
    layouts = [(tensor.shape, tensor.stride()) for tensor in tensors]
    of_layout = dict(zip(layouts, tensors, strict=True))
    blank = {key: torch.empty_like(one, dtype=dtype) for key, one in of_layout.items()}
    # The quickest way to many tensors with a storage each; what is in them is overwritten.
    made = torch._foreach_neg([blank[layout] for layout in layouts])  # pyright: ignore[reportPrivateImportUsage] - a public operator without a public name
    torch._foreach_copy_(made, tensors)  # pyright: ignore[reportPrivateImportUsage] - as above
    return tuple(made)


def converted_at_once(
    tensors: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """The same on two streams of a GPU, so that the end of one kernel is the middle of another.

    The memory is that of the current stream, which waits for the other one at the end.
    """
    device = tensors[0].device
    current, other = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    there = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors[1::2]]
    other.wait_stream(current)
    try:
        with torch.cuda.stream(other):
            for new, tensor in zip(there, tensors[1::2], strict=True):
                new.copy_(tensor)
        here = [*map(_to(dtype), tensors[::2])]
    finally:
        # Also after an error: what was begun still writes to memory that is free again then.
        current.wait_stream(other)
    made = [*here, *there]
    made[::2], made[1::2] = here, there
    return tuple(made)


def fetch_memory(num_bytes: int, device: torch.device) -> None:
    """Have PyTorch fetch a GPU's memory in one piece, of which it makes several tensors afterwards.

    Asking the driver for each of them takes longer than to cast it. What cannot be had in one
    piece may still be had in several.
    """
    with suppress(torch.OutOfMemoryError):
        torch.empty(num_bytes, dtype=torch.uint8, device=device)


def converted_views(
    tensors: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Tensors that are views of one storage in `dtype`, and views of one storage again."""
    if not all(map(is_plain, tensors)):
        made = converted_views(tuple(map(local, tensors)), dtype)
        return tuple(map(rewrapped, tensors, made))
    start, end = _span(tensors)
    flat = _negated_like(tensors[0], tensors[0].detach()).as_strided((end - start,), (1,), start)
    flat = flat.to(dtype)
    views = tuple(
        _negated_like(
            tensor, flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - start)
        )
        for tensor in tensors
    )
    for tensor, view in zip(tensors, views, strict=True):
        # A CPU gives NaN other bits in memory with gaps: a tensor's own cast is what it must be.
        if not tensor.is_contiguous():
            write(view, tensor.detach().to(dtype))
    return views


def bytes_of_views(tensors: Sequence[torch.Tensor], dtype: torch.dtype) -> int:
    """How much memory `converted_views` takes: all of the storage, and the largest with gaps."""
    held = tuple(map(local, tensors))
    start, end = _span(held)
    with_gaps = [tensor.numel() for tensor in held if not tensor.is_contiguous()]
    return (end - start + max(with_gaps, default=0)) * dtype.itemsize


def _span(tensors: Sequence[torch.Tensor]) -> tuple[int, int]:
    """Where in their storage views begin and end, in elements."""
    starts = [int(tensor.storage_offset()) for tensor in tensors]
    ends = [start + _extent(tensor) for start, tensor in zip(starts, tensors, strict=True)]
    return min(starts), max(ends)


def _negated_like(tensor: torch.Tensor, view: torch.Tensor) -> torch.Tensor:
    """`view`, negated on reading if `tensor` is, as the imaginary part of a conjugate; or back."""
    return torch._neg_view(view) if tensor.is_neg() else view  # pyright: ignore[reportPrivateImportUsage] - a public operator without a public name


def write(view: torch.Tensor, values: torch.Tensor) -> None:
    """Copy into a view, also into an expanded one, whose elements lie on one another."""
    own = tuple(slice(1) if step == 0 else slice(None) for step in view.stride())
    view[own].copy_(values[own])


def _extent(tensor: torch.Tensor) -> int:
    """How many elements of storage lie between a tensor's first and its last, inclusive."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
