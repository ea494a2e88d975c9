"""A cast as data: the plan and its entries."""

from __future__ import annotations

import attrs
import torch
from torch import nn

from automodel_fn.cast._entries import TensorCast
from automodel_fn.cast._json import plan_from_json, plan_to_json
from automodel_fn.cast._layout import Layout
from automodel_fn.cast._units import FSDPUnit, units_of
from automodel_fn.dtypes import dtype_name
from automodel_fn.plans import Row, WeakObjects, planned_model


@attrs.frozen
class PlanDifference:
    """A tensor of which two plans say different things; None where a plan does not have it.

    Example:
        >>> str(PlanDifference("w", ours=None, theirs=None))
        'w: absent -> absent'
    """

    name: str
    ours: TensorCast | None = attrs.field(kw_only=True)
    theirs: TensorCast | None = attrs.field(kw_only=True)

    def __str__(self) -> str:
        """The difference in one line."""
        return f"{self.name}: {_outline(self.ours)} -> {_outline(self.theirs)}"


def _outline(entry: TensorCast | None) -> str:
    if entry is None:
        return "absent"
    dtypes = dtype_name(entry.from_dtype)
    if entry.changes:
        dtypes += f" to {dtype_name(entry.to_dtype)}"
    return f"{entry.action} {dtypes} ({entry.reason})"


@attrs.frozen
class CastPlan:
    """What a cast will do to every tensor of a model; nothing has happened yet.

    Plans are equal if their entries, dtype and notes are; the model that a plan was made from is
    referred to weakly, and is no part of its value.

    Args:
        entries: One entry a tensor, in the order of the model.
        dtype: The target dtype; None where there is no single one, as in an inverse.
        notes: Remarks for a person.
        inverse_of: The target dtype of the plan that this one takes back, in an inverse.

    Example:
        >>> from automodel_fn import bf16, cast_plan
        >>> plan = cast_plan(torch.nn.Linear(2, 2), bf16)
        >>> CastPlan.from_json(plan.to_json()) == plan
        True
        >>> plan.diff(cast_plan(torch.nn.Linear(2, 2), bf16, skip="bias"))[0].name
        'bias'
    """

    entries: tuple[TensorCast, ...]
    dtype: torch.dtype | None = attrs.field(default=None, kw_only=True)
    notes: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    inverse_of: torch.dtype | None = attrs.field(default=None, kw_only=True)
    model_ref: WeakObjects = attrs.field(
        factory=WeakObjects, kw_only=True, eq=False, repr=False, alias="model_ref"
    )
    optimizer_refs: WeakObjects = attrs.field(
        factory=WeakObjects, kw_only=True, eq=False, repr=False
    )
    layout: Layout = attrs.field(factory=Layout, kw_only=True, eq=False, repr=False)

    def model(self) -> nn.Module:
        """The model that the plan was made from.

        Raises:
            ConfigError: There is none: the plan came from JSON, or the model is gone.
        """
        return planned_model(self.model_ref)

    def rows(self) -> tuple[Row, ...]:
        """One row a tensor, in the order of the model."""
        return tuple(entry.row() for entry in self.entries)

    def inverse(self) -> CastPlan:
        """The plan that brings every stored dtype back; the inverse of that one is this one.

        Dtypes, not bits: what a narrowing cast rounded away is gone. To bring bits back use
        `apply(plan, keep_originals=True)` and `report.undo()`, or `snapshot` and `restore`.
        """
        entries = tuple(entry.inverse() for entry in self.entries)
        return attrs.evolve(self, entries=entries, dtype=self.inverse_of, inverse_of=self.dtype)

    def fsdp_units(self) -> tuple[FSDPUnit, ...]:
        """The modules that have to be units of their own in FSDP2's `fully_shard`.

        Raises:
            ConfigError: The plan has no single dtype, as an inverse.
        """
        return units_of(self.entries, self.dtype)

    def diff(self, other: CastPlan) -> tuple[PlanDifference, ...]:
        """The tensors of which `other` says something else, in our order, then in theirs."""
        ours = {entry.name: entry for entry in self.entries}
        theirs = {entry.name: entry for entry in other.entries}
        return tuple(
            PlanDifference(name, ours=ours.get(name), theirs=theirs.get(name))
            for name in dict.fromkeys([*ours, *theirs])
            if ours.get(name) != theirs.get(name)
        )

    def to_json(self) -> str:
        """The plan as JSON text; without its model and optimizers."""
        return plan_to_json(self)

    @classmethod
    def from_json(cls, text: str) -> CastPlan:
        """The plan of a JSON text; without a model.

        Raises:
            ConfigError: The text is no plan; the message names the place.
        """
        return plan_from_json(text, cls, TensorCast)
