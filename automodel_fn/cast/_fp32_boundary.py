"""One boundary around a module's forward: which module, why, and the forward itself."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from automodel_fn.cast._fsdp import class_of
from automodel_fn.dtypes import dtype_name

_NARROW = (torch.bfloat16, torch.float16)


@attrs.frozen
class BoundaryOwner:
    """A module whose fp32 pins need a boundary.

    Args:
        name: Its FQN.
        module: The module.
        compute_dtype: The dtype that comes in and has to go out.
        found: What it does without a boundary, in words.
        owns_pins: Whether it holds pins itself. If not, it hands on the float32 that pins in it
            give, and only what comes out is put back.
        helps: Whether it runs in a boundary.
    """

    name: str
    module: nn.Module = attrs.field(kw_only=True, eq=False, repr=False)
    compute_dtype: torch.dtype = attrs.field(kw_only=True)
    found: str = attrs.field(kw_only=True)
    owns_pins: bool = attrs.field(kw_only=True, default=True)
    helps: bool = attrs.field(kw_only=True, default=True)

    def note(self) -> str:
        """The owner in words."""
        module = f"{self.name!r} ({class_of(self.module).__name__})"
        found = f"given {dtype_name(self.compute_dtype)} it {self.found}"
        if not self.helps:
            return (
                f"the fp32 pins of {module} do not fit its other tensors: {found}, "
                "and in float32 it fails too; pin all of its tensors or none"
            )
        subject = f"the fp32 pins of {module} need" if self.owns_pins else f"{module} needs"
        cause = "" if self.owns_pins else ", since an fp32 pin in it does"
        return f"{subject} fp32_boundaries(model, plan): {found}{cause}"


class Fp32Boundary:
    """A module's forward with float32 inside, whatever comes in.

    A plain object and not a closure, so that a copied or pickled model takes its own along.
    """

    def __init__(self, owner: BoundaryOwner, inner: Callable[..., Any] | None) -> None:
        self.module = owner.module
        self.compute_dtype = owner.compute_dtype
        self.owns_pins = owner.owns_pins
        self.inner = inner
        self.order = _parameter_names(inner or type(owner.module).forward)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward."""
        # Keywords may come in any order; what a forward names first is its activation.
        named = [kwargs[name] for name in self.order if name in kwargs]
        incoming = _float_dtype((args, named, kwargs))
        forward = self.inner or type(self.module).forward.__get__(self.module)
        if self.owns_pins:
            with _without_autocast(self.module, (args, kwargs)):
                output = forward(*_to((*args,), torch.float32), **_to(kwargs, torch.float32))
        else:
            output = forward(*args, **kwargs)
        if incoming is None and isinstance(self.module, nn.Embedding | nn.EmbeddingBag):
            incoming = self.compute_dtype
        return output if incoming not in _NARROW else _back(output, incoming)


def _parameter_names(forward: Callable[..., Any]) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(forward).parameters)
    except (TypeError, ValueError):  # of a builtin
        return ()


def _without_autocast(module: nn.Module, values: Any) -> contextlib.AbstractContextManager[Any]:
    """Autocast computes a float32 product in a narrow dtype: off, where it is on."""
    tensors = (v for v in tree_leaves(values) if isinstance(v, torch.Tensor))
    first = next(tensors, None)
    if first is None:
        first = next(module.parameters(), None)
    device = "cpu" if first is None else first.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _float_dtype(values: Any) -> torch.dtype | None:
    dtypes = (v.dtype for v in tree_leaves(values) if isinstance(v, torch.Tensor))
    return next((dtype for dtype in dtypes if dtype.is_floating_point), None)


def _to(values: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.dtype in _NARROW else t, values)


def _back(values: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(
        torch.Tensor, lambda t: t.to(dtype) if t.dtype == torch.float32 else t, values
    )
