"""Laws of the way back: the inverse plan, and undo."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from automodel_fn.cast._plan import CastPlan
from automodel_fn.cast._planners import cast_plan
from automodel_fn.errors import StalePlanError
from automodel_fn.plans import apply
from automodel_fn.testing._expected import facts_after
from automodel_fn.testing._facts import (
    all_differs,
    demand,
    demand_none,
    facts_of,
    values_differ,
)
from automodel_fn.testing._laws_cast import demand_aliases, demand_same_objects
from automodel_fn.testing._twin import tensors_of, twin_of


def check_inverse(model: nn.Module, dtype: torch.dtype, **plan_options: Any) -> None:
    """Law: `apply(plan.inverse())` brings every stored dtype back; twice it is the plan.

    The bits are those of the two roundings, `tensor.to(there).to(back)`.

    Args:
        model: A model; it is not changed, a copy is cast.
        dtype: The target dtype.
        plan_options: Options of `cast_plan`.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> check_inverse(nn.Linear(2, 2), torch.bfloat16)
    """
    twin = twin_of(model)
    before = facts_of(twin)
    plan = cast_plan(twin, dtype, **plan_options)
    apply(plan, twin)
    own = {id(fact.tensor): fact.dtype for fact in before.values()}
    expected = facts_after(twin, own)
    apply(plan.inverse(), twin)
    after = facts_of(twin)
    demand_none("the inverse did not bring the dtypes back", values_differ(after, expected))
    demand_aliases(after, before)
    demand_same_objects(after, before)
    demand(plan.inverse().inverse() == plan, "the inverse of the inverse is another plan")
    read = CastPlan.from_json(plan.inverse().to_json())
    demand(read.inverse() == plan, "an inverse from JSON has another plan as its inverse")


def check_undo(model: nn.Module, dtype: torch.dtype, **plan_options: Any) -> None:
    """Law: `report.undo()` brings every bit back, once, and refuses where weights have changed.

    Args:
        model: A model; it is not changed, a copy is cast.
        dtype: The target dtype.
        plan_options: Options of `cast_plan`.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> check_undo(nn.Linear(2, 2), torch.bfloat16)
    """
    twin = twin_of(model)
    before = facts_of(twin)
    report = apply(cast_plan(twin, dtype, **plan_options), twin, keep_originals=True)
    report.undo()
    after = facts_of(twin)
    demand_none("undo did not bring the model back", values_differ(after, before))
    demand_aliases(after, before)
    demand_same_objects(after, before)
    try:
        report.undo()
    except StalePlanError:
        demand_none("a refused undo changed the model", all_differs(facts_of(twin), after))
    else:
        raise AssertionError("a second undo was not refused")
    _demand_that_edits_are_kept(twin, dtype, plan_options)


def _demand_that_edits_are_kept(
    twin: nn.Module, dtype: torch.dtype, plan_options: dict[str, Any]
) -> None:
    stored = {name: tensor.dtype for name, tensor in tensors_of(twin)}
    report = apply(cast_plan(twin, dtype, **plan_options), twin, keep_originals=True)
    for name, tensor in tensors_of(twin):
        if tensor.dtype == stored[name] or not tensor.numel() or tensor.is_meta:
            continue
        with torch.no_grad():
            first = tensor[(0,) * tensor.dim()]
            first.fill_(5.0 if first == 3.0 else 3.0)
        edited = facts_of(twin)
        try:
            report.undo()
        except StalePlanError:
            demand_none("a refused undo changed the model", all_differs(facts_of(twin), edited))
            return
        raise AssertionError(f"undo was not refused though {name} had been edited since the cast")
