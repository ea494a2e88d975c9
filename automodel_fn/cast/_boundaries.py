"""Boundaries around fp32 pins: float32 in, and out again in the dtype that came in."""

from __future__ import annotations

from torch import nn

from automodel_fn.cast._fp32_boundary import Fp32Boundary
from automodel_fn.cast._groups import in_fp32_units
from automodel_fn.cast._plan import CastPlan
from automodel_fn.cast._promotion import boundary_owners, pin_owners
from automodel_fn.cast._tensors import scan
from automodel_fn.errors import PatchError, itemized
from automodel_fn.handles import Handle


class BoundaryHandle(Handle):
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


def fp32_boundaries(model: nn.Module, plan: CastPlan) -> BoundaryHandle:
    """Let fp32 pins run in a bf16 model: float32 in, and the dtype that came in out again.

    A kept tensor can break the next forward: a bf16 activation meets a float32 Linear, or a norm
    with a float32 weight returns float32 to a bf16 Linear. Only modules that do not deal with it
    themselves get a boundary; the plan's notes name them. Inside of one autocast is off, so that
    the pin is computed in float32 there too.

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
    model_scan = scan(model)
    settled = in_fp32_units(model_scan, plan.dtype)
    found = boundary_owners(pin_owners(model_scan, plan.entries), plan.dtype, settled)
    owners = [owner for owner in found if owner.helps]
    boundaries = tuple(Fp32Boundary(owner, vars(owner.module).get("forward")) for owner in owners)
    for boundary in boundaries:
        boundary.module.forward = boundary
    return BoundaryHandle(tuple(owner.name for owner in owners), boundaries)
