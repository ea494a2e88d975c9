"""What every plan shares: it is data that one can read, and `apply` carries it out."""

from __future__ import annotations

import weakref
from functools import singledispatch
from typing import Any, Protocol, runtime_checkable

import attrs
from torch import nn

from automodel_fn.errors import ConfigError


@attrs.frozen
class Row:
    """One decision of a plan, in words, for rendering. Sizes are in bytes.

    Args:
        name: What the decision is about, as an FQN.
        before: What it is now.
        after: What it will be.
        action: What is done, in one word.
        reason: By which rule.
        shape: Its shape in words, or "".
        num_aliases: Under how many further names it is known.
        bytes_before: Its size now.
        bytes_after: Its size afterwards.

    Example:
        >>> row = Row("norm.weight", before="float32", after="float32", action="keep", reason="pin")
        >>> row.name, row.action
        ('norm.weight', 'keep')
    """

    name: str
    before: str = attrs.field(kw_only=True)
    after: str = attrs.field(kw_only=True)
    action: str = attrs.field(kw_only=True)
    reason: str = attrs.field(kw_only=True)
    shape: str = attrs.field(default="", kw_only=True)
    num_aliases: int = attrs.field(default=0, kw_only=True)
    bytes_before: int = attrs.field(default=0, kw_only=True)
    bytes_after: int = attrs.field(default=0, kw_only=True)


@runtime_checkable
class Plan(Protocol):
    """Any plan: rows to read, notes on what deserves attention.

    Example:
        >>> from automodel_fn import bf16, cast_plan
        >>> isinstance(cast_plan(nn.Linear(2, 2), bf16), Plan)
        True
    """

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for a person, in a fixed order."""
        ...

    def rows(self) -> tuple[Row, ...]:
        """One row a decision, in the order of the model."""
        ...


class WeakObjects:
    """Weak references to the objects that a plan was made from; a copy or pickle has none."""

    __slots__ = ("_references",)

    def __init__(self, *objects: Any) -> None:
        self._references = tuple(weakref.ref(item) for item in objects)

    def alive(self) -> tuple[Any, ...]:
        """Those that still exist."""
        found = (reference() for reference in self._references)
        return tuple(item for item in found if item is not None)

    def __reduce__(self) -> tuple[type[WeakObjects], tuple[()]]:
        return WeakObjects, ()


def planned_model(reference: WeakObjects) -> nn.Module:
    """The model that a plan was made from.

    Raises:
        ConfigError: There is none: the plan came from JSON, or the model is gone.
    """
    alive = reference.alive()
    if not alive:
        raise ConfigError(
            "model=None: this plan has no model (it came from JSON or a copy, or its model is "
            "gone); say which one, as in apply(plan, model)."
        )
    return alive[0]


@singledispatch
def apply(
    plan: Any,
    model: nn.Module | None = None,
    *,
    keep_originals: bool = False,
    checksum: bool = False,
) -> Any:
    """Carry a plan out, wholly or not at all; the model is modified in place.

    First everything is checked against the model as it is now. Parameters stay the same objects,
    with their ties, hooks, attributes and optimizer references; a gradient is cast with its
    parameter, and so is the state of the optimizers that the plan was given.

    Two modes. Streaming (the default) releases each original as soon as its cast is in place: extra
    memory is that of the largest tensor. An interruption rolls back while every original is still
    there, and after that it is finished first, and then raised: the model is wholly cast.
    With `keep_originals=True` every interruption rolls back, and the report can undo; the
    originals' memory is held by the report. Widening casts always keep their originals until the
    first narrowing one is in place.

    A backend plan exchanges classes of modules and settings of configs, and no tensor: an
    interruption always rolls back, and its report can always undo.

    A sharded model is cast by all of its ranks together: each has to call `apply`, and if one
    cannot cast, none has. Its originals are kept until all are done.

    Args:
        plan: A plan, as `cast_plan`, `backend_plan` and their kind return it.
        model: The model to change; by default the one that the plan was made from.
        keep_originals: Keep what was there before, so that `report.undo()` brings it back.
        checksum: Take a checksum of every tensor afterwards, for `audit(..., bits=True)`.

    Returns:
        A CastReport, or of a backend plan a SwapReport: what was done.

    Raises:
        StalePlanError: The model is no longer the one that was planned for; every difference is
            listed and nothing was changed.
        ConfigError: There is no model: the plan came from JSON, or its model is gone. Or a wrapper
            around its parameters could not go on with them: FSDP2 with a group of several dtypes,
            or DDP or FSDP1 at all.
        PartialCastError: An interrupted cast could be neither finished nor rolled back.
        OtherRankError: It failed on another rank of a sharded model, and was rolled back on this.

    Example:
        >>> import torch
        >>> from automodel_fn import bf16, cast_plan
        >>> model = torch.nn.Linear(4, 4)
        >>> report = apply(cast_plan(model, bf16))
        >>> model.weight.dtype, report.bytes_before, report.bytes_after
        (torch.bfloat16, 80, 40)
    """
    raise ConfigError(
        f"plan={type(plan).__name__} is not a plan; "
        "make one with cast_plan(model, bf16), frozen_cast_plan(model, bf16) or "
        "backend_plan(model, backend)."
    )
