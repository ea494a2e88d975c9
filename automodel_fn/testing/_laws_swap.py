"""Law of swaps: any sequence of plans and of their inverses ends where it began."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from automodel_fn.backend._config import BackendConfig
from automodel_fn.convert._apply import apply_backend_plan
from automodel_fn.convert._plan import BackendPlan
from automodel_fn.convert._planner import backend_plan
from automodel_fn.convert._rulebook import CONFIG_RULES, MODULE_RULES
from automodel_fn.errors import BackendUnavailableError
from automodel_fn.testing._facts import demand, demand_none


def check_swaps(model: nn.Module, moves: Sequence[BackendConfig | None]) -> None:
    """Law: plans, and the inverses of those that stand, end where they began, and say where.

    After each move the modules run as the last plan said, their parameters are the same objects,
    and the state dict has the same keys. At the end, with all plans taken back, every class, every
    attribute and every setting of a config is what it was. A plan that has been taken back can be
    made again and is equal.

    Args:
        model: A model; at the end it is as before.
        moves: A backend to plan and apply, or None to take back the last plan that stands. A
            backend that cannot run here, or in no module of the model, is no move.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> model = nn.Sequential(nn.Linear(16, 16))
        >>> check_swaps(model, [BackendConfig(linear="torch"), None])
    """
    before, kept = _facts(model), _kept(model)
    standing: list[BackendPlan] = []
    for move in moves:
        if move is not None:
            standing += _taken(model, move)
        elif standing:
            _take_back(standing.pop(), model)
        demand(_kept(model) == kept, "a swap changed parameters or the keys of the state dict")
    while standing:
        _take_back(standing.pop(), model)
    demand_none("not where it began", _differences(before, _facts(model)))


def _taken(model: nn.Module, move: BackendConfig) -> Iterator[BackendPlan]:
    """The plan that was applied; none where no module of the model fits the backend."""
    try:
        plan = backend_plan(model, move)
    except BackendUnavailableError:
        return
    apply_backend_plan(plan, model)
    demand_none("not as planned", _unlike(plan, model, move))
    yield plan


def _take_back(plan: BackendPlan, model: nn.Module) -> None:
    inverse = plan.inverse()
    demand(BackendPlan.from_json(inverse.to_json()) == inverse, "an inverse is lost in JSON")
    demand(inverse.inverse() == plan, "the inverse of the inverse is another plan")
    apply_backend_plan(inverse, model)


def _unlike(plan: BackendPlan, model: nn.Module, backend: BackendConfig) -> Iterator[str]:
    """What a new plan for the same backend would still change."""
    for entry in backend_plan(model, backend).entries:
        if entry.changes:
            yield f"{entry.label}, {entry.field}: {entry.before} would become {entry.after}"
    fields = {entry.field for entry in plan.entries}
    demand(fields <= {*MODULE_RULES, *CONFIG_RULES}, f"a plan has unknown fields: {fields}")


def _kept(model: nn.Module) -> tuple[Any, ...]:
    tensors = (*model.named_parameters(remove_duplicate=False), *model.named_buffers())
    return tuple(model.state_dict()), tuple((name, id(tensor)) for name, tensor in tensors)


def _facts(model: nn.Module) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        found[f"class of {name}"] = type(module)
        for attribute, value in vars(module).items():
            found[f"{name}.{attribute}"] = _fact(value)
        for setting, value in vars(getattr(module, "config", object)).items():
            if setting.endswith("_implementation_internal"):
                found[f"{name}.config.{setting}"] = value
    return found


def _fact(value: Any) -> Any:
    """What has to be the same again: objects themselves, also dicts, and what they hold."""
    if isinstance(value, dict):
        held: dict[Any, Any] = value
        return id(held), {key: id(each) for key, each in held.items()}
    is_plain = isinstance(value, bool | int | float | str | torch.dtype | torch.Size)
    return value if is_plain else id(value)


def _differences(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    for name in dict.fromkeys([*before, *after]):
        if before.get(name, "absent") != after.get(name, "absent"):
            yield f"{name}: {before.get(name, 'absent')} -> {after.get(name, 'absent')}"
