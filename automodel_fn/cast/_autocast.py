"""Which fp32 pins torch.autocast would compute in a narrow dtype, although they are stored in fp32.

Decided by trying, as the boundaries are. autocast looks at a tensor's device, and knows no meta
device; so the copies have tensors that say they are on the CPU and hold a meta tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from automodel_fn.cast._promotion import PinOwner
from automodel_fn.cast._trials import (
    activations,
    takes_an_activation,
    tensors_of,
    twin,
    without_traces,
)
from automodel_fn.dtypes import dtype_name
from automodel_fn.fqn import joined

_NARROW = (torch.bfloat16, torch.float16)


def autocast_note(owners: Sequence[PinOwner], dtype: torch.dtype | None) -> tuple[str, ...]:
    """One note on all fp32 pins that a forward under torch.autocast would round to `dtype`."""
    if dtype is None or dtype == torch.float32:
        return ()
    verdicts: dict[Any, frozenset[str]] = {}
    lowered: dict[int, str] = {}
    for owner in owners:
        if not owner.owns_pins:
            continue
        if owner.alike not in verdicts:
            verdicts[owner.alike] = _lowered_keys(owner, dtype)
        keys = verdicts[owner.alike]
        for key, tensor in tensors_of(owner.module) if keys else ():
            if key in keys:
                lowered.setdefault(id(tensor), joined(owner.name, key))
    if not lowered:
        return ()
    return (
        f"{len(lowered)} fp32 pins, as {next(iter(lowered.values()))!r}, would be computed in "
        f"{dtype_name(dtype)} under torch.autocast; turn it off around their modules, as "
        "fp32_boundaries(model, plan) does where it puts a boundary",
    )


def _lowered_keys(owner: PinOwner, dtype: torch.dtype) -> frozenset[str]:
    if not takes_an_activation(owner.module):
        return frozenset()
    trial = twin(owner.module, owner.keys, dtype, dress=_OnCpu)
    if trial is None:
        return frozenset()
    for activation in activations(owner.module, dtype):
        rounded = _rounded(trial, _OnCpu(activation), dtype, autocast=True)
        if rounded is None:
            continue
        # What the module rounds by itself is its own affair.
        rounded -= _rounded(trial, _OnCpu(activation), dtype, autocast=False) or set()
        pins = ((key, tensor) for key, tensor in tensors_of(trial) if key in owner.keys)
        return frozenset(key for key, pin in pins if _storage(pin) in rounded)
    return frozenset()


def _rounded(
    trial: nn.Module, activation: torch.Tensor, dtype: torch.dtype, *, autocast: bool
) -> set[int] | None:
    """The storages of the float32 tensors that a forward rounds, or None if it does not run."""
    watch = _WatchRounding()
    try:
        with (
            without_traces(),
            torch.autocast("cpu", dtype=dtype, enabled=autocast, cache_enabled=False),
            watch,
        ):
            type(trial).forward(trial, activation)
    except Exception:  # noqa: BLE001 - user code on a guessed input: any failure means "cannot say"
        return None
    return watch.storages


def _storage(tensor: Any) -> int:
    return tensor.on_meta.untyped_storage()._cdata


class _OnCpu(torch.Tensor):
    """A tensor that says it is on the CPU, holds a meta tensor, and is computed with as that."""

    on_meta: torch.Tensor

    @staticmethod
    def __new__(cls: type[_OnCpu], on_meta: torch.Tensor) -> _OnCpu:
        return torch.Tensor._make_wrapper_subclass(
            cls,
            on_meta.size(),
            strides=on_meta.stride(),
            storage_offset=on_meta.storage_offset(),
            dtype=on_meta.dtype,
            device=torch.device("cpu"),
        )

    def __init__(self, on_meta: torch.Tensor) -> None:
        self.on_meta = on_meta

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(torch.Tensor, _on_meta, (args, kwargs or {}))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("meta")
        return tree_map_only(torch.Tensor, cls, func(*args, **kwargs))


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.on_meta if isinstance(tensor, _OnCpu) else tensor.to("meta")


class _WatchRounding(TorchDispatchMode):
    """Keeps in mind which float32 tensors are copied to a narrower floating dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name == "aten::_to_copy" and kwargs.get("dtype") in _NARROW:
            source = args[0]
            if isinstance(source, _OnCpu) and source.dtype == torch.float32:
                self.storages.add(_storage(source))
        return func(*args, **kwargs)
