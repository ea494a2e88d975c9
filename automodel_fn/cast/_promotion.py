"""Which modules need a boundary: fp32 pins in them, and they do not deal with it by themselves.

Decided by trying, not by a list of classes. A module that holds pins is copied to the meta device
(no data, no hooks) twice: once as if nothing were pinned, once with its pins. If the first runs on
an activation of the target dtype and the second fails or returns another dtype, the pin would
break or promote what comes after it. The module around it is tried as well, with the boundary in
place: it may cast to the pin's own dtype and hand float32 on. Where neither runs (a forward that
takes more than an activation), nothing can be said, and nothing is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import nn

from automodel_fn.cast._entries import KEEP, TensorCast
from automodel_fn.cast._fp32_boundary import BoundaryOwner, Fp32Boundary
from automodel_fn.cast._tensors import ModelScan
from automodel_fn.cast._trials import (
    activations,
    is_small,
    modules_of,
    output_dtypes,
    signature,
    takes_an_activation,
    tensors_of,
    twin,
)
from automodel_fn.dtypes import dtype_name
from automodel_fn.fqn import owner_of

_MOST_MODULES = 64
_MOST_MODULES_AROUND = 16


@attrs.frozen
class PinOwner:
    """A module that holds fp32 pins, or that is around one that does.

    Args:
        name: Its FQN.
        module: The module.
        keys: The pins in it and beneath, by the module's own names for them.
        owns_pins: Whether it holds a pin itself.
        alike: Equal for those that need one trial.
    """

    name: str
    module: nn.Module = attrs.field(kw_only=True, eq=False, repr=False)
    keys: frozenset[str] = attrs.field(kw_only=True)
    owns_pins: bool = attrs.field(kw_only=True)
    alike: Any = attrs.field(kw_only=True, eq=False, repr=False)


def pin_owners(model_scan: ModelScan, entries: Sequence[TensorCast]) -> tuple[PinOwner, ...]:
    """The modules that hold fp32 pins, and those right around them, each once."""
    kept = {name for entry in entries if entry.action == KEEP for name in entry.names}
    if not kept:
        return ()
    pinned = {id(item.tensor) for item in model_scan.tensors if not kept.isdisjoint(item.names)}
    owning = {owner_of(name) for name in kept}
    outside = {owner_of(name) for name in owning if name}
    found: dict[int, PinOwner] = {}
    for name, _, module in model_scan.modules:
        owns_pins = name in owning
        most = _MOST_MODULES if owns_pins else _MOST_MODULES_AROUND
        if id(module) in found or not (owns_pins or name in outside) or not is_small(module, most):
            continue
        keys = frozenset(key for key, tensor in tensors_of(module) if id(tensor) in pinned)
        if keys:
            alike = (signature(module, keys), owns_pins)
            found[id(module)] = PinOwner(
                name, module=module, keys=keys, owns_pins=owns_pins, alike=alike
            )
    return tuple(found.values())


def boundary_owners(
    owners: Sequence[PinOwner], dtype: torch.dtype | None, settled: Collection[nn.Module] = ()
) -> tuple[BoundaryOwner, ...]:
    """The modules with fp32 pins that do not deal with activations of `dtype` by themselves.

    Args:
        owners: The modules that hold pins.
        dtype: The dtype of the activations.
        settled: Modules for which someone else does.
    """
    if dtype is None or dtype == torch.float32:
        return ()
    verdicts: dict[Any, BoundaryOwner | None] = {}
    found: dict[int, BoundaryOwner] = {}
    # What is inside comes first: a trial of a module has the boundaries that are in it.
    for owner in sorted(owners, key=lambda owner: -owner.name.count(".") - bool(owner.name)):
        if owner.module in settled:
            continue
        inside = {
            key: found[id(child)]
            for key, child in modules_of(owner.module)
            if id(child) in found and key
        }
        if not (owner.owns_pins or inside):
            continue
        alike = (owner.alike, tuple(inside))
        if alike not in verdicts:
            verdicts[alike] = _verdict(owner, inside, dtype)
        verdict = verdicts[alike]
        if verdict is not None:
            found[id(owner.module)] = attrs.evolve(verdict, name=owner.name, module=owner.module)
    return tuple(found[id(owner.module)] for owner in owners if id(owner.module) in found)


def _verdict(
    owner: PinOwner, inside: Mapping[str, BoundaryOwner], dtype: torch.dtype
) -> BoundaryOwner | None:
    if not takes_an_activation(owner.module):
        return None
    unpinned = _trial(owner, frozenset(), {}, dtype)
    for activation in activations(owner.module, dtype):
        wanted = output_dtypes(unpinned, activation)
        if not wanted:
            continue
        got = output_dtypes(_trial(owner, owner.keys, inside, dtype), activation)
        if got == wanted or not (owner.owns_pins or (got and set(wanted) == {dtype})):
            return None
        found = f"returns {', '.join(dtype_name(d) for d in got)}" if got else "fails"
        wide = activation.float() if activation.is_floating_point() else activation
        return BoundaryOwner(
            owner.name,
            module=owner.module,
            compute_dtype=dtype,
            found=found,
            owns_pins=owner.owns_pins,
            helps=bool(got or output_dtypes(_trial(owner, owner.keys, inside, dtype), wide)),
        )
    return None


def _trial(
    owner: PinOwner,
    keys: frozenset[str],
    inside: Mapping[str, BoundaryOwner],
    dtype: torch.dtype,
) -> nn.Module | None:
    trial = twin(owner.module, keys, dtype)
    if trial is not None:
        for key, boundary in inside.items():
            child = trial.get_submodule(key)
            if boundary.helps:
                child.forward = Fp32Boundary(attrs.evolve(boundary, module=child), None)
    return trial
