"""DTensors: the shard that this rank holds, and new content for one that stays the same object."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch.distributed.tensor import DTensor


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds its own dense storage, and no subclass decides what its data is."""
    kind = type(tensor)
    if kind is not torch.nn.Parameter and kind is not torch.Tensor:
        ours, plain = cast("tuple[Any, Any]", (kind, torch.Tensor))
        if ours.__torch_dispatch__ is not plain.__torch_dispatch__:
            return False
    return tensor.layout is torch.strided and not tensor.is_quantized


def is_distributed(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor: a shard, a replica, or a part of a sum."""
    return isinstance(tensor, DTensor)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether it is a DTensor of plain shards or replicas that are the values themselves.

    One with a sum that is still to be made (a Partial placement) is not: to cast its parts and to
    cast the sum are not the same.
    """
    if type(tensor) is not DTensor:
        return False
    partial = any(placement.is_partial() for placement in tensor.placements)
    return not partial and is_plain(tensor._local_tensor)


def is_whole(tensor: torch.Tensor) -> bool:
    """Whether a tensor is of a kind that is cast, copied and compared: plain, or a DTensor."""
    return is_plain(tensor) or is_sharded(tensor)


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this rank holds of a tensor: the shard of a DTensor, and a plain tensor itself."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


def rewrapped(tensor: torch.Tensor, shard: torch.Tensor) -> torch.Tensor:
    """`shard` as a tensor of the kind, shape and placements of `tensor`."""
    if not isinstance(tensor, DTensor):
        return shard
    return DTensor.from_local(
        shard.detach(),
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def on_shards(
    function: Callable[..., torch.Tensor], tensor: torch.Tensor, *others: torch.Tensor
) -> torch.Tensor:
    """`function` of what this rank holds of each tensor, as one of the kind of the first."""
    return rewrapped(tensor, function(local(tensor), *map(local, others)))


def swap_content(tensor: torch.Tensor, new: torch.Tensor) -> None:
    """Give a DTensor the shard and dtype of `new`; it stays the same object, and so does `new`.

    Assigning `.data` would change the dtype that a DTensor says it has, and not its shard. Its
    attributes and hooks stay with it, which `swap_tensors` alone would exchange as well. Its
    gradient has to be taken off before. Can be repeated.

    Raises:
        RuntimeError: Something else refers to it; nothing was changed.
    """
    with torch.no_grad():
        twin = new.detach().requires_grad_(tensor.requires_grad)
    grad_dtype: torch.dtype | None = getattr(tensor, "grad_dtype", tensor.dtype)
    if tensor.requires_grad and grad_dtype != tensor.dtype:
        twin.grad_dtype = grad_dtype
    torch.utils.swap_tensors(tensor, twin)
    mine, other = cast("tuple[Any, Any]", (tensor, twin))
    mine.__dict__, other.__dict__ = other.__dict__, mine.__dict__
    # Python knows the hooks still; this tells C++ of them, whose record went with the content.
    for hooks in ("_backward_hooks", "_post_accumulate_grad_hooks"):
        if getattr(mine, hooks) is not None:
            setattr(mine, hooks, getattr(mine, hooks))
