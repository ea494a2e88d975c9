"""Laws of a plan: it is made by reading alone, and it is good for one state of the model only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
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

    Equal models give equal plans, on their device and on meta, whatever their weights are, and
    whatever the order and the kind of collection in which they declare fp32 pins; JSON brings an
    equal plan back, which has no model. A model that changed in any way that a plan speaks of, also
    by this very plan, is refused as a whole, with each mismatch.

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
    demand(planned(twin_of(model)) == plan, "an equal model gave another plan")
    for collection in (tuple, set, _reverse):
        twin = _redeclared(twin_of(model), collection)
        demand(planned(twin) == plan, "the plan depends on how fp32 pins are declared")
    demand(planned(_scrambled(twin_of(model))) == plan, "the plan depends on the weights' values")
    demand(planned(twin_of(model, "meta")) == plan, "on the meta device the plan is another one")
    _demand_round_trip(plan)
    for change in CHANGES:
        _demand_stale(model, planned, change)
    _demand_stale(model, planned, _widen, _toggle, _reshape, _tie)
    _demand_applied_once(model, planned)


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


def _reverse(keywords: Iterable[str]) -> list[str]:
    return list(keywords)[::-1]


def _redeclared(model: nn.Module, collection: Callable[[Iterable[str]], Any]) -> nn.Module:
    """The model with its own declarations (not those of its classes) in another collection."""
    for module in model.modules():
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            if isinstance(vars(module).get(attribute), list | tuple | set | frozenset):
                vars(module)[attribute] = collection(vars(module)[attribute])
    return model


Change = Callable[[nn.Module], tuple[str, str] | None]
"""Changes a model; says which tensor differs, by its last name, and in what; None if none can."""


def _demand_stale(model: nn.Module, planned: Planner, *changes: Change) -> None:
    twin = twin_of(model)
    plan = planned(twin)
    made = [what for change in changes if (what := change(twin)) is not None]
    if made:
        _demand_refused(twin, plan, made)


def _demand_applied_once(model: nn.Module, planned: Planner) -> None:
    twin = twin_of(model)
    plan = planned(twin)
    changed = [entry for entry in plan.entries if entry.changes]
    apply(plan, twin)
    if changed:
        _demand_refused(twin, plan, [(entry.name, "dtype") for entry in changed])


def _demand_refused(twin: nn.Module, plan: CastPlan, made: list[tuple[str, str]]) -> None:
    before = facts_of(twin)
    try:
        apply(plan, twin)
    except StalePlanError as error:
        head = f"a plan that was refused ({made}) changed the model"
        demand_none(head, all_differs(facts_of(twin), before))
        lines = str(error).splitlines()
        is_cut = any(line.strip().startswith("... and ") for line in lines)
        for name, what in made:
            is_listed = any(f"{name}: {what} " in line for line in lines)
            demand(is_listed or is_cut, f"a stale plan was refused without {name}: {what}")
        return
    raise AssertionError(f"a stale plan was not refused: {made}")


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _firsts(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor once, by the last part of the name that it has first."""
    seen: set[int] = set()
    for name, tensor in tensors_of(model):
        if id(tensor) not in seen and not seen.add(id(tensor)):
            yield _last(name), tensor


def _widen(model: nn.Module) -> tuple[str, str] | None:
    for name, tensor in _firsts(model):
        if is_plain(tensor) and tensor.dtype.is_floating_point and tensor.grad is None:
            other = torch.float64 if tensor.dtype != torch.float64 else torch.float32
            tensor.data = tensor.data.to(other)
            return name, "dtype"
    return None


def _reshape(model: nn.Module) -> tuple[str, str] | None:
    for name, tensor in reversed(list(_firsts(model))):
        if is_plain(tensor) and tensor.grad is None:
            tensor.data = tensor.data.unsqueeze(0)
            return name, "shape"
    return None


def _toggle(model: nn.Module) -> tuple[str, str] | None:
    for name, tensor in _firsts(model):
        if tensor.dtype.is_floating_point and tensor.is_leaf:
            tensor.requires_grad_(not tensor.requires_grad)
            return name, "requires_grad"
    return None


def _add(model: nn.Module) -> tuple[str, str]:
    name = "automodel_fn_law"
    model.register_buffer(name, torch.zeros(1))
    return name, "presence"


def _remove(model: nn.Module) -> tuple[str, str] | None:
    held = _holders(model)
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and held[id(tensor)] == 1:
                module._parameters[name] = None
                return name, "presence"
    return None


def _tie(model: nn.Module) -> tuple[str, str] | None:
    for module in model.modules():
        for tensor in module._parameters.values():
            if tensor is not None:
                module.register_parameter("automodel_fn_tie", tensor)
                return "", "names"
    return None


def _untie(model: nn.Module) -> tuple[str, str] | None:
    held = _holders(model)
    for module in model.modules():
        for name, tensor in module._parameters.items():
            if tensor is not None and held[id(tensor)] > 1 and is_plain(tensor):
                fresh = nn.Parameter(tensor.detach().clone(), requires_grad=tensor.requires_grad)
                module._parameters[name] = fresh
                return "", "names"
    return None


def _holders(model: nn.Module) -> Counter[int]:
    """In how many places of its modules each tensor is registered."""
    held = [
        tensor
        for m in model.modules()
        for tensor in (*m._parameters.values(), *m._buffers.values())
    ]
    return Counter(id(tensor) for tensor in held if tensor is not None)


CHANGES: tuple[Change, ...] = (_widen, _toggle, _reshape, _untie, _tie, _remove, _add)
