"""Laws of a plan: it is made by reading alone, and it is good for one state of the model only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from automodel_fn.cast._plan import CastPlan
from automodel_fn.cast._planners import cast_plan
from automodel_fn.errors import ConfigError, StalePlanError
from automodel_fn.plans import apply
from automodel_fn.testing._facts import all_differs, demand, demand_none, facts_of
from automodel_fn.testing._twin import is_plain, tensors_of, twin_of

Planner = Callable[[nn.Module], CastPlan]


def check_plan_is_pure(model: nn.Module, dtype: torch.dtype, **plan_options: Any) -> None:
    """Law: planning only reads, and sees no data; a plan is a value, and a stale one is refused.

    The same model gives the same plan, on its device and on meta, and whatever its weights are;
    JSON brings an equal plan back, which has no model; a model that changed in any way that a plan
    speaks of is refused as a whole.

    Args:
        model: A model; it is not changed.
        dtype: The target dtype.
        plan_options: Options of `cast_plan`.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> check_plan_is_pure(nn.Linear(2, 2), torch.bfloat16)
    """

    def planned(any_model: nn.Module) -> CastPlan:
        return cast_plan(any_model, dtype, **plan_options)

    plan = _demand_reading_only(model, planned)
    demand(planned(model) == plan, "planning twice gave two plans")
    demand(planned(_scrambled(twin_of(model))) == plan, "the plan depends on the weights' values")
    demand(planned(twin_of(model, "meta")) == plan, "on the meta device the plan is another one")
    _demand_round_trip(plan)
    for change in (_widen, _toggle, _add, _remove):
        _demand_stale(model, planned, change)


def _demand_reading_only(model: nn.Module, planned: Planner) -> CastPlan:
    before, versions, inside = facts_of(model), _versions(model), list(_insides(model))
    plan = planned(model)
    demand_none("planning changed the model", all_differs(facts_of(model), before))
    demand(_versions(model) == versions, "planning wrote to a tensor (its version moved)")
    demand(list(_insides(model)) == inside, "planning added to a module or took from it")
    return plan


def _versions(model: nn.Module) -> dict[str, int]:
    return {name: t._version for name, t in tensors_of(model) if not t.is_inference()}


def _insides(model: nn.Module) -> Iterator[tuple[str, object]]:
    for name, module in model.named_modules(remove_duplicate=False):
        yield name, type(module)
        for key, value in vars(module).items():
            size = len(value) if isinstance(value, dict) else None  # pyright: ignore[reportUnknownArgumentType]
            yield f"{name}.{key}", (id(value), size)


def _scrambled(model: nn.Module) -> nn.Module:
    for _, tensor in tensors_of(model):
        if is_plain(tensor) and not tensor.is_meta:
            storage: Any = tensor.untyped_storage()
            storage.fill_(1)
    return model


def _demand_round_trip(plan: CastPlan) -> None:
    text = plan.to_json()
    read = CastPlan.from_json(text)
    demand(read == plan and read.to_json() == text, "JSON brings another plan back")
    try:
        apply(read)
    except ConfigError:
        return
    raise AssertionError("a plan from JSON was applied without a model")


def _demand_stale(
    model: nn.Module, planned: Planner, change: Callable[[nn.Module], str | None]
) -> None:
    twin = twin_of(model)
    plan = planned(twin)
    what = change(twin)
    if what is None:
        return
    changed = facts_of(twin)
    try:
        apply(plan, twin)
    except StalePlanError:
        head = f"a plan that was refused ({what}) changed the model"
        demand_none(head, all_differs(facts_of(twin), changed))
        return
    raise AssertionError(f"a stale plan was not refused: {what}")


def _widen(model: nn.Module) -> str | None:
    for name, tensor in tensors_of(model):
        if is_plain(tensor) and tensor.dtype.is_floating_point and tensor.grad is None:
            other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
            tensor.data = tensor.data.to(other)
            return f"{name} became {other}"
    return None


def _toggle(model: nn.Module) -> str | None:
    for name, tensor in model.named_parameters():
        if tensor.dtype.is_floating_point and tensor.is_leaf:
            tensor.requires_grad_(not tensor.requires_grad)
            return f"{name} has another requires_grad"
    return None


def _add(model: nn.Module) -> str:
    name = "automodel_fn_law"
    model.register_buffer(name, torch.zeros(1))
    return f"{name} was added"


def _remove(model: nn.Module) -> str | None:
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None:
                module._parameters[name] = None
                return f"{name} was removed"
    return None
