"""A change of backends as data: the plan, and how two of them differ."""

from __future__ import annotations

import attrs
from torch import nn

from automodel_fn.convert._entries import ModuleSwap
from automodel_fn.convert._json import plan_from_json, plan_to_json
from automodel_fn.plans import Row, WeakObjects, planned_model


@attrs.frozen
class SwapDifference:
    """A module of which two plans say different things; None where a plan does not have it.

    Example:
        >>> str(SwapDifference("norm", field="rms_norm", ours=None, theirs=None))
        'norm, rms_norm: absent -> absent'
    """

    name: str
    field: str = attrs.field(kw_only=True)
    ours: ModuleSwap | None = attrs.field(kw_only=True)
    theirs: ModuleSwap | None = attrs.field(kw_only=True)

    def __str__(self) -> str:
        """The difference in one line."""
        label = self.name or "(model)"
        return f"{label}, {self.field}: {_outline(self.ours)} -> {_outline(self.theirs)}"


def _outline(entry: ModuleSwap | None) -> str:
    if entry is None:
        return "absent"
    what = f"{entry.before} to {entry.after}" if entry.changes else entry.before
    return f"{entry.action} {what} ({entry.reason})"


@attrs.frozen
class BackendPlan:
    """What a backend will make of every module of a model; nothing has happened yet.

    Plans are equal if their entries and notes are; the model that a plan was made from is referred
    to weakly, and is no part of its value.

    Args:
        entries: In the order of the model; one for each module and field that acts on it.
        notes: Remarks for a person; also on what a field asks for that acts on nothing here.

    Example:
        >>> from automodel_fn import BackendConfig, backend_plan
        >>> plan = backend_plan(nn.Sequential(nn.Linear(16, 16)), BackendConfig(linear="torch"))
        >>> [(entry.name, entry.field, entry.action) for entry in plan.entries]
        [('0', 'linear', 'keep')]
        >>> BackendPlan.from_json(plan.to_json()) == plan
        True
    """

    entries: tuple[ModuleSwap, ...]
    notes: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    model_ref: WeakObjects = attrs.field(
        factory=WeakObjects, kw_only=True, eq=False, repr=False, alias="model_ref"
    )

    def model(self) -> nn.Module:
        """The model that the plan was made from.

        Raises:
            ConfigError: There is none: the plan came from JSON, or the model is gone.
        """
        return planned_model(self.model_ref)

    def rows(self) -> tuple[Row, ...]:
        """One row an entry, in the order of the model."""
        return tuple(entry.row() for entry in self.entries)

    def inverse(self) -> BackendPlan:
        """The plan that brings every module back; the inverse of that one is this one."""
        return attrs.evolve(self, entries=tuple(entry.inverse() for entry in self.entries))

    def diff(self, other: BackendPlan) -> tuple[SwapDifference, ...]:
        """What `other` says differently, in our order, then in theirs."""
        ours = {(entry.name, entry.field): entry for entry in self.entries}
        theirs = {(entry.name, entry.field): entry for entry in other.entries}
        return tuple(
            SwapDifference(key[0], field=key[1], ours=ours.get(key), theirs=theirs.get(key))
            for key in dict.fromkeys([*ours, *theirs])
            if ours.get(key) != theirs.get(key)
        )

    def to_json(self) -> str:
        """The plan as JSON text; without its model.

        Raises:
            ConfigError: FP8 by a recipe object, which has no name.
        """
        return plan_to_json(self)

    @classmethod
    def from_json(cls, text: str) -> BackendPlan:
        """The plan of a JSON text; without a model.

        Raises:
            ConfigError: The text is no plan; the message names the place.
        """
        return plan_from_json(text, cls, ModuleSwap)
