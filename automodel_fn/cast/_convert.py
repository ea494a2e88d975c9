"""Tensors in another dtype, bit for bit as `tensor.to(dtype)` makes them."""

from __future__ import annotations

from collections.abc import Callable
from operator import methodcaller

import torch

from automodel_fn.cast._dtensors import is_plain, local, rewrapped

# The same as `tensor.to(dtype)`, with less to parse: that is a third of a small tensor's cast.
_TO_DTYPE: dict[torch.dtype, Callable[[torch.Tensor], torch.Tensor]] = {
    torch.float32: torch.Tensor.float,
    torch.bfloat16: torch.Tensor.bfloat16,
    torch.float16: torch.Tensor.half,
}


def converted(tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Each tensor in `dtype`, in a storage of its own."""
    if not {torch.Tensor, torch.nn.Parameter}.issuperset(map(type, tensors)):
        return tuple(tensor.detach().to(dtype) for tensor in tensors)
    data = tensors
    if torch.is_grad_enabled():  # an interrupt as no_grad begins would leave it on
        data = tuple([tensor.data for tensor in tensors])
    if data[0].is_cuda and len(data) > 1:
        return _converted_together(data, dtype)
    return tuple(map(_TO_DTYPE.get(dtype) or methodcaller("to", dtype), data))


def _converted_together(
    tensors: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """The same in two calls, where a launch for each tensor would take longer than its cast."""
    if not all(map(torch.Tensor.is_contiguous, tensors)):
        return tuple(tensor.to(dtype) for tensor in tensors)
    shapes = [tensor.shape for tensor in tensors]
    device = tensors[0].device
    blank = {shape: torch.empty(shape, dtype=dtype, device=device) for shape in set(shapes)}
    # The quickest way to many tensors with a storage each; what is in them is overwritten.
    made = torch._foreach_neg([blank[shape] for shape in shapes])  # pyright: ignore[reportPrivateImportUsage] - a public operator without a public name
    torch._foreach_copy_(made, tensors)  # pyright: ignore[reportPrivateImportUsage] - as above
    return tuple(made)


def converted_views(
    tensors: tuple[torch.Tensor, ...], dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    """Tensors that are views of one storage in `dtype`, and views of one storage again."""
    if not all(map(is_plain, tensors)):
        made = converted_views(tuple(map(local, tensors)), dtype)
        return tuple(map(rewrapped, tensors, made))
    start = min(tensor.storage_offset() for tensor in tensors)
    end = max(tensor.storage_offset() + _extent(tensor) for tensor in tensors)
    flat = tensors[0].detach().as_strided((end - start,), (1,), start).to(dtype)
    views = tuple(
        flat.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset() - start)
        for tensor in tensors
    )
    for tensor, view in zip(tensors, views, strict=True):
        # A CPU gives NaN other bits in memory with gaps: a tensor's own cast is what it must be.
        if not tensor.is_contiguous():
            write(view, tensor.detach().to(dtype))
    return views


def write(view: torch.Tensor, values: torch.Tensor) -> None:
    """Copy into a view, also into an expanded one, whose elements lie on one another."""
    own = tuple(slice(1) if step == 0 else slice(None) for step in view.stride())
    view[own].copy_(values[own])


def _extent(tensor: torch.Tensor) -> int:
    """How many elements of storage lie between a tensor's first and its last, inclusive."""
    return 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
