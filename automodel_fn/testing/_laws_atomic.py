"""Law of all or nothing: an effect that fails leaves nothing in between."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_fn.cast._plan import CastPlan
from automodel_fn.cast._planners import cast_plan
from automodel_fn.cast._snapshot import restore, snapshot
from automodel_fn.cast._temporary import temporary_cast
from automodel_fn.plans import apply
from automodel_fn.testing._facts import Facts, demand, facts_of, values_differ
from automodel_fn.testing._laws_cast import demand_aliases, demand_same_objects
from automodel_fn.testing._oracle import CASTABLE
from automodel_fn.testing._twin import is_plain, tensors_of, twin_of


class InjectedError(MemoryError):
    """Raised in place of an operation.

    Example:
        >>> issubclass(InjectedError, MemoryError)
        True
    """


class InjectedInterrupt(KeyboardInterrupt):
    """Raised right after an operation.

    Example:
        >>> issubclass(InjectedInterrupt, KeyboardInterrupt)
        True
    """


class _FailAt(TorchDispatchMode):
    """Fail at one of the operations that reach the dispatcher; count them all."""

    def __init__(self, place: int, failure: type[BaseException]) -> None:
        super().__init__()
        self._place, self._failure = place, failure
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen += 1
        is_hit = self.seen == self._place
        failure = self._failure(f"injected at operation {self.seen}, {func._schema.name}")
        if is_hit and isinstance(failure, InjectedError):
            raise failure
        result = func(*args, **(kwargs or {}))
        if is_hit:
            raise failure
        return result


Effect = Callable[[], object]
BEFORE, AFTER = "before", "after"


def _apply(model: nn.Module, plan: CastPlan) -> Effect:
    return lambda: apply(plan, model)


def _apply_and_keep(model: nn.Module, plan: CastPlan) -> Effect:
    return lambda: apply(plan, model, keep_originals=True)


def _undo(model: nn.Module, plan: CastPlan) -> Effect:
    return apply(plan, model, keep_originals=True).undo


def _restore(model: nn.Module, plan: CastPlan) -> Effect:
    plain = [name for name, tensor in tensors_of(model) if is_plain(tensor)]
    saved = snapshot(model, plain)
    apply(plan, model)
    _edit(model)
    return lambda: restore(saved, model)


def _enter(model: nn.Module, plan: CastPlan) -> Effect:
    return temporary_cast(model, _dtype_of(plan)).__enter__


def _exit(model: nn.Module, plan: CastPlan) -> Effect:
    context = temporary_cast(model, _dtype_of(plan))
    context.__enter__()
    _edit(model)
    return lambda: context.__exit__(None, None, None)


def _dtype_of(plan: CastPlan) -> torch.dtype:
    return plan.dtype or torch.bfloat16


def _edit(model: nn.Module) -> None:
    with torch.no_grad():
        for _, tensor in tensors_of(model):
            is_edited = is_plain(tensor) and tensor.dtype in CASTABLE and not tensor.is_meta
            if is_edited and tensor.numel():
                tensor[(0,) * tensor.dim()] = 1


_EFFECTS: dict[str, tuple[Callable[[nn.Module, CastPlan], Effect], tuple[str, ...]]] = {
    "apply": (_apply, (BEFORE, AFTER)),
    "apply keeping originals": (_apply_and_keep, (BEFORE,)),
    "undo": (_undo, (BEFORE, AFTER)),
    "restore": (_restore, (BEFORE, AFTER)),
    "enter temporary_cast": (_enter, (BEFORE,)),
    "leave temporary_cast": (_exit, (AFTER,)),
}
EFFECTS = tuple(_EFFECTS)


def check_all_or_nothing(
    model: nn.Module,
    dtype: torch.dtype,
    *,
    effects: Iterable[str] = EFFECTS,
    max_places: int = 100,
    **plan_options: Any,
) -> None:
    """Law: whichever operation fails, the model is wholly as before or wholly as after.

    Every operation that reaches torch's dispatcher fails once with a MemoryError in its place, and
    once with a KeyboardInterrupt right after it. With `keep_originals=True`, and on entering a
    temporary cast, the model is always as before; on leaving one, always as after. Names, ties,
    shared storages, attributes and hooks stay, and the failure is raised.

    Args:
        model: A model; it is not changed, copies are cast.
        dtype: The target dtype.
        effects: Which of "apply", "apply keeping originals", "undo", "restore",
            "enter temporary_cast" and "leave temporary_cast" fail.
        max_places: At how many operations to fail, evenly spread, in each effect and way; every one
            is tried on a copy of its own.
        plan_options: Options of `cast_plan`.

    Raises:
        AssertionError: It does not hold; the message says at which operation.

    Example:
        >>> check_all_or_nothing(nn.Linear(2, 2), torch.bfloat16)
    """
    for effect in effects:
        for failure in (InjectedError, InjectedInterrupt):
            trial = _Trial(model, dtype, effect, failure, plan_options)
            num_places, after = trial.run_whole()
            for place in range(1, num_places + 1, max(1, -(-num_places // max_places))):
                trial.check(place, after)


@attrs.frozen
class _Trial:
    """One effect that fails in one way."""

    model: nn.Module
    dtype: torch.dtype
    effect: str
    failure: type[BaseException]
    plan_options: dict[str, Any]

    def run_whole(self) -> tuple[int, Facts]:
        """How many operations it is, and what it makes of the model."""
        twin, run = self._prepared()
        with _FailAt(sys.maxsize, self.failure) as counter:
            run()
        return counter.seen, facts_of(twin)

    def check(self, place: int, after: Facts) -> None:
        """Fail at one operation.

        Raises:
            AssertionError: The model is in between, or the failure was swallowed.
        """
        at = f"{self.effect}: {self.failure.__name__} at operation {place}"
        twin, run = self._prepared()
        before = facts_of(twin)
        try:
            with _FailAt(place, self.failure):
                run()
        except self.failure:
            pass
        else:
            raise AssertionError(f"{at} was swallowed")
        now = facts_of(twin)
        demand_aliases(now, before)
        demand_same_objects(now, before)
        unlike = {
            BEFORE: list(values_differ(now, before)),
            AFTER: list(values_differ(now, after)),
        }
        allowed = _EFFECTS[self.effect][1]
        demand(
            any(not unlike[state] for state in allowed),
            f"{at} left the model in between; unlike before: {unlike[BEFORE]}; "
            f"unlike after: {unlike[AFTER]}; allowed: {' or '.join(allowed)}",
        )

    def _prepared(self) -> tuple[nn.Module, Effect]:
        twin = twin_of(self.model)
        plan = cast_plan(twin, self.dtype, **self.plan_options)
        return twin, _EFFECTS[self.effect][0](twin, plan)
