"""Law of optimizers: training goes on after a cast, after its undo and after its inverse."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from automodel_fn.cast._plan import CastPlan
from automodel_fn.cast._planners import cast_plan
from automodel_fn.plans import apply
from automodel_fn.testing._facts import demand, demand_none, facts_of, values_differ
from automodel_fn.testing._oracle import CASTABLE
from automodel_fn.testing._twin import bits_of, is_plain, tensors_of, twin_of

MakeOptimizer = Callable[[Sequence[nn.Parameter]], Optimizer]
Way = Callable[[nn.Module, CastPlan], object]
"""Takes a model somewhere by its plan."""


def check_training_goes_on(
    model: nn.Module, dtype: torch.dtype, make_optimizer: MakeOptimizer, **plan_options: Any
) -> None:
    """Law: an optimizer given to the plan goes on as one that was made for the cast model.

    A step is taken, the model is cast, a second step is taken; and so with an undo and with an
    inverse after the cast. The state stays the same objects. What the second step does is compared,
    bit for bit, with that of another optimizer, made after the cast, which loads the first one's
    state.

    Args:
        model: A model; it is not changed, copies are cast. Its forward is not run: gradients are
            made up, for each trainable tensor that could be cast and has memory without gaps.
        dtype: The target dtype.
        make_optimizer: Makes an optimizer of parameters.
        plan_options: Options of `cast_plan`.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> check_training_goes_on(nn.Linear(2, 2), torch.bfloat16, torch.optim.AdamW)
    """
    if not _trained(model):
        return
    for way in (_cast, _cast_and_undo, _cast_and_back):
        _check_way(model, dtype, make_optimizer, plan_options, way)


def _cast(model: nn.Module, plan: CastPlan) -> None:
    apply(plan, model)


def _cast_and_undo(model: nn.Module, plan: CastPlan) -> None:
    apply(plan, model, keep_originals=True).undo()


def _cast_and_back(model: nn.Module, plan: CastPlan) -> None:
    apply(plan, model)
    apply(plan.inverse(), model)


def _check_way(
    model: nn.Module,
    dtype: torch.dtype,
    make_optimizer: MakeOptimizer,
    plan_options: dict[str, Any],
    way: Way,
) -> None:
    at = way.__name__.strip("_").replace("_", " ")
    twin = twin_of(model)
    trained = _trained(twin)
    optimizer = make_optimizer(trained)
    _step(optimizer, trained)
    other, state = twin_of(twin), copy.deepcopy(optimizer.state_dict())
    also_trained = _trained(other)
    before = dict(_states(optimizer))

    way(twin, cast_plan(twin, dtype, optimizers=[optimizer], **plan_options))
    after = dict(_states(optimizer))
    demand(list(after) == list(before), f"{at}: the optimizer has other state than before")
    replaced = (key for key in before if after[key] is not before[key])
    demand_none(f"{at}: state that is another object", map(str, replaced))

    plan = cast_plan(other, dtype, **plan_options)
    expected = _loaded(plan, other, state, lambda: make_optimizer(also_trained), way)
    demand_none(f"{at}: state", _states_differ(optimizer, expected))
    _step(optimizer, trained)
    _step(expected, also_trained)
    demand_none(f"{at}, then a step", values_differ(facts_of(twin), facts_of(other)))
    demand_none(f"{at}, then a step: state", _states_differ(optimizer, expected))


def _loaded(
    plan: CastPlan,
    other: nn.Module,
    state: dict[str, Any],
    make_optimizer: Callable[[], Optimizer],
    way: Way,
) -> Optimizer:
    """An optimizer that never saw a cast: PyTorch's own loading gives its state the dtypes."""
    if way is _cast_and_back:
        apply(plan, other)
        there = make_optimizer()
        there.load_state_dict(state)
        state = copy.deepcopy(there.state_dict())
        apply(plan.inverse(), other)
    else:
        way(other, plan)
    made = make_optimizer()
    made.load_state_dict(state)
    return made


def _trained(model: nn.Module) -> list[nn.Parameter]:
    parameters = {id(t): t for _, t in tensors_of(model) if isinstance(t, nn.Parameter)}
    return [p for p in parameters.values() if _is_trained(p)]


def _is_trained(parameter: nn.Parameter) -> bool:
    is_castable = is_plain(parameter) and parameter.dtype in CASTABLE and not parameter.is_meta
    is_dense = is_castable and torch.empty_like(parameter).stride() == parameter.stride()
    return parameter.requires_grad and is_dense


def _step(optimizer: Optimizer, parameters: Sequence[nn.Parameter]) -> None:
    for parameter in parameters:
        values = torch.linspace(0.25, 1.001, parameter.numel(), device=parameter.device)
        grad = torch.empty_like(parameter, requires_grad=False)
        parameter.grad = grad.copy_(values.reshape(parameter.shape))
    optimizer.step()


def _states(optimizer: Optimizer) -> Iterator[tuple[tuple[int, str], torch.Tensor]]:
    for place, state in enumerate(optimizer.state.values()):
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                yield (place, key), value


def _states_differ(optimizer: Optimizer, expected: Optimizer) -> Iterator[str]:
    found, wanted = dict(_states(optimizer)), dict(_states(expected))
    for key in dict.fromkeys([*wanted, *found]):
        if key not in found or key not in wanted:
            yield f"{key} is on one side alone"
        elif found[key].dtype != wanted[key].dtype:
            yield f"{key} is {found[key].dtype}, expected {wanted[key].dtype}"
        elif not torch.equal(bits_of(found[key]), bits_of(wanted[key])):
            yield f"{key} has other bits than expected"
