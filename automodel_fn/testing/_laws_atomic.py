"""Law of all or nothing: a cast that fails leaves nothing in between."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_fn.cast._planners import cast_plan
from automodel_fn.plans import apply
from automodel_fn.testing._facts import Facts, demand, facts_of, values_differ
from automodel_fn.testing._laws_cast import demand_aliases
from automodel_fn.testing._twin import twin_of

_CONVERSION = "aten::_to_copy"


class InjectedError(MemoryError):
    """Raised in place of a conversion.

    Example:
        >>> issubclass(InjectedError, MemoryError)
        True
    """


class _FailAt(TorchDispatchMode):
    """Let one conversion fail; count them all."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self._place = place
        self.seen = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == _CONVERSION:
            self.seen += 1
            if self.seen == self._place:
                raise InjectedError(f"injected at conversion {self._place}")
        return func(*args, **(kwargs or {}))


def check_all_or_nothing(
    model: nn.Module, dtype: torch.dtype, *, max_places: int = 100, **plan_options: Any
) -> None:
    """Law: whichever conversion fails, the model is wholly as before or wholly cast.

    With `keep_originals=True` it is always as before. Names, ties and shared storages stay either
    way, and the failure is raised.

    Args:
        model: A model; it is not changed, copies are cast.
        dtype: The target dtype.
        max_places: At how many conversions to fail, evenly spread, in each mode; every one is
            tried on a copy of its own.
        plan_options: Options of `cast_plan`.

    Raises:
        AssertionError: It does not hold; the message says at which conversion.

    Example:
        >>> check_all_or_nothing(nn.Linear(2, 2), torch.bfloat16)
    """
    for keep_originals in (False, True):
        done = twin_of(model)
        plan = cast_plan(done, dtype, **plan_options)
        with _FailAt(sys.maxsize) as counter:
            apply(plan, done, keep_originals=keep_originals)
        after = facts_of(done)
        step = max(1, -(-counter.seen // max_places))
        for place in range(1, counter.seen + 1, step):
            _check_place(model, dtype, plan_options, place, keep_originals, after)


def _check_place(
    model: nn.Module,
    dtype: torch.dtype,
    plan_options: dict[str, Any],
    place: int,
    keep_originals: bool,
    after: Facts,
) -> None:
    at = f"a failure of conversion {place} (keep_originals={keep_originals})"
    twin = twin_of(model)
    before = facts_of(twin)
    plan = cast_plan(twin, dtype, **plan_options)
    try:
        with _FailAt(place):
            apply(plan, twin, keep_originals=keep_originals)
    except InjectedError:
        pass
    else:
        raise AssertionError(f"{at} was swallowed")
    now = facts_of(twin)
    demand_aliases(now, before)
    undone = list(values_differ(now, before))
    unfinished = list(values_differ(now, after))
    demand(
        not undone or not (unfinished or keep_originals),
        f"{at} left the model in between; unlike before: {undone}; unlike cast: {unfinished}",
    )
