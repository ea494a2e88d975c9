"""Boundaries around fp32 pins: float32 in, and out again in the dtype that came in."""

from __future__ import annotations

from collections.abc import Callable
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from automodel_fn.cast._plan import CastPlan
from automodel_fn.cast._promotion import BoundaryOwner, boundary_owners
from automodel_fn.cast._tensors import scan
from automodel_fn.errors import PatchError, itemized

_NARROW = (torch.bfloat16, torch.float16)


class Fp32Boundary:
    """A module's forward with float32 inside, whatever comes in.

    A plain object and not a closure, so that a copied or pickled model takes its own along.
    """

    def __init__(self, owner: BoundaryOwner, inner: Callable[..., Any] | None) -> None:
        self.module = owner.module
        self.compute_dtype = owner.compute_dtype
        self.inner = inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the forward."""
        incoming = _float_dtype((args, kwargs))
        forward = self.inner or type(self.module).forward.__get__(self.module)
        output = forward(*_to((*args,), torch.float32), **_to(kwargs, torch.float32))
        if incoming is None and isinstance(self.module, nn.Embedding | nn.EmbeddingBag):
            incoming = self.compute_dtype
        return output if incoming not in _NARROW else _back(output, incoming)


def _float_dtype(values: Any) -> torch.dtype | None:
    dtypes = (v.dtype for v in tree_leaves(values) if isinstance(v, torch.Tensor))
    return next((dtype for dtype in dtypes if dtype.is_floating_point), None)


def _to(values: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(torch.Tensor, lambda t: t.to(dtype) if t.dtype in _NARROW else t, values)


def _back(values: Any, dtype: torch.dtype) -> Any:
    return tree_map_only(
        torch.Tensor, lambda t: t.to(dtype) if t.dtype == torch.float32 else t, values
    )


class BoundaryHandle:
    """The boundaries that one call has put up; also a context manager.

    Attributes:
        names: FQNs of the modules that have one.

    Example:
        >>> from automodel_fn import bf16, cast_plan
        >>> model = nn.Sequential(nn.Linear(2, 2))
        >>> handle = fp32_boundaries(model, cast_plan(model, bf16, keep_fp32="0"))
        >>> handle.names
        ('0',)
        >>> handle.remove()
    """

    def __init__(self, names: tuple[str, ...], boundaries: tuple[Fp32Boundary, ...]) -> None:
        self.names = names
        self._boundaries = boundaries

    def remove(self) -> None:
        """Take the boundaries away; the modules are as before. Again is no error.

        Raises:
            PatchError: Someone has replaced a module's forward since; nothing was removed.
        """
        changed = [
            name
            for name, boundary in zip(self.names, self._boundaries, strict=False)
            if vars(boundary.module).get("forward") is not boundary
        ]
        if changed:
            raise PatchError(
                itemized(
                    f"the forward of {len(changed)} modules was replaced since:",
                    changed,
                    "Undo that first, then remove the boundaries.",
                )
            )
        for boundary in self._boundaries:
            del boundary.module.forward
            if boundary.inner is not None:
                boundary.module.forward = boundary.inner
        self._boundaries = ()

    def __enter__(self) -> BoundaryHandle:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.remove()


def fp32_boundaries(model: nn.Module, plan: CastPlan) -> BoundaryHandle:
    """Let fp32 pins run in a bf16 model: float32 in, and the dtype that came in out again.

    A kept tensor can break the next forward: a bf16 activation meets a float32 Linear, or a norm
    with a float32 weight returns float32 to a bf16 Linear. Only modules that do not deal with it
    themselves get a boundary; the plan's notes name them.

    Args:
        model: The model, before or after the plan is applied.
        plan: The plan with the pins.

    Returns:
        A handle with `.remove()`, and with the `.names` of the modules; also a context manager.

    Example:
        >>> import torch
        >>> from automodel_fn import apply, bf16, cast_plan
        >>> model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        >>> plan = cast_plan(model, bf16, keep_fp32="1")
        >>> _ = apply(plan)
        >>> with fp32_boundaries(model, plan) as handle:
        ...     handle.names, model(torch.ones(1, 2, dtype=bf16)).dtype
        (('1',), torch.bfloat16)
    """
    owners = boundary_owners(scan(model), plan.entries, plan.dtype)
    boundaries = tuple(Fp32Boundary(owner, vars(owner.module).get("forward")) for owner in owners)
    for boundary in boundaries:
        boundary.module.forward = boundary
    return BoundaryHandle(tuple(owner.name for owner in owners), boundaries)
