"""Whether a weight has changed since: what a cache of something made from it must ask.

Noticed: optimizer steps, in-place changes (version counter), a new storage (a cast, `.data = x`,
`load_state_dict(assign=True)`), `load_state_dict`, and `invalidate`. Not noticeable: `.data.add_`,
raw kernels, optimizers inside a CUDA graph, and changes of an FSDP2-sharded weight that are no
optimizer step; after these call `invalidate(model)`.

An optimizer step is noticed through PyTorch's global hook and counts for every weight, whichever
optimizer it was: a fused step does not move version counters, and a cache made anew once too often
is slower, never wrong.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import attrs
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parameter import is_lazy
from torch.optim.optimizer import register_optimizer_step_post_hook


@attrs.define
class _Counts:
    """How often something happened that no weight shows by itself; `events` counts all of it."""

    optimizer_steps: int = 0
    events: int = 0
    sharded_invalidations: int = 0
    is_watching: bool = False


counts = _Counts()
_INVALIDATIONS = "_automodel_fn_invalidations"
"""Attribute of a tensor; a table with weak references would keep `swap_tensors` from working."""


@attrs.frozen
class WeightStamp:
    """A weight's state at one moment, to compare with a later one.

    Holds no memory of the weight: the storage is referred to weakly, which also keeps its address
    from being used again while the stamp exists.
    """

    _storage: StorageWeakRef | None = attrs.field(eq=lambda ref: ref and ref.cdata)
    place: tuple[Any, ...] = attrs.field(kw_only=True)
    version: int = attrs.field(kw_only=True)
    optimizer_steps: int = attrs.field(kw_only=True)
    invalidations: int = attrs.field(kw_only=True)


def weight_stamp(weight: torch.Tensor) -> WeightStamp:
    """The state of a weight now; equal to an earlier one if the weight has not changed since.

    Example:
        >>> weight = torch.ones(2)
        >>> before = weight_stamp(weight)
        >>> weight_stamp(weight) == before
        True
        >>> weight_stamp(weight.add_(1)) == before
        False
    """
    watch_optimizers()
    return WeightStamp(
        _storage_ref(weight),
        place=_place(weight),
        version=0 if is_lazy(weight) or weight.is_inference() else weight._version,
        optimizer_steps=counts.optimizer_steps,
        invalidations=invalidations(weight),
    )


def invalidate(model: nn.Module | torch.Tensor | Iterable[torch.Tensor]) -> None:
    """Say that weights have changed in a way that cannot be noticed.

    After `weight.data.add_(...)`, a raw kernel, or an optimizer step inside a CUDA graph: whatever
    was made from these weights (quantized copies, split parts) is made anew at the next use.

    Args:
        model: A module (all of its parameters and buffers), a tensor, or several tensors.

    Example:
        >>> layer = torch.nn.Linear(2, 2)
        >>> before = weight_stamp(layer.weight)
        >>> invalidate(layer)
        >>> weight_stamp(layer.weight) == before
        False
    """
    if isinstance(model, nn.Module):
        tensors: Iterable[torch.Tensor] = (*model.parameters(), *model.buffers())
    else:
        tensors = (model,) if isinstance(model, torch.Tensor) else model
    for tensor in tensors:
        counts.events += 1
        setattr(tensor, _INVALIDATIONS, invalidations(tensor) + 1)
        # A forward under FSDP2 sees another tensor object than the model's: count for every weight.
        counts.sharded_invalidations += isinstance(tensor, DTensor)


def invalidations(weight: torch.Tensor) -> int:
    """How often `invalidate` may have meant this weight."""
    return getattr(weight, _INVALIDATIONS, 0) + counts.sharded_invalidations


def _place(weight: torch.Tensor) -> tuple[Any, ...]:
    if is_lazy(weight):
        return ()
    if weight.layout is not torch.strided:
        return tuple(weight.shape), weight.dtype
    return tuple(weight.shape), weight.dtype, weight.stride(), weight.storage_offset()


def _storage_ref(weight: torch.Tensor) -> StorageWeakRef | None:
    try:
        return StorageWeakRef(weight.untyped_storage())
    except (NotImplementedError, RuntimeError, ValueError):
        return None  # a wrapper without a storage of its own, a sparse or an uninitialized tensor


def watch_optimizers() -> None:
    """Count optimizer steps from now on, if they are not counted yet."""
    if counts.is_watching:
        return

    def count(*_: Any) -> None:
        counts.optimizer_steps += 1
        counts.events += 1

    register_optimizer_step_post_hook(count)
    counts.is_watching = True
