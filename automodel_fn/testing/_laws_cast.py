"""Laws of a cast: what it casts is cast exactly, and what belongs together stays together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from automodel_fn.cast._planners import cast_plan
from automodel_fn.plans import apply
from automodel_fn.testing._expected import disagreements, expected_cast, facts_after, targets_of
from automodel_fn.testing._facts import (
    Facts,
    all_differs,
    demand,
    demand_none,
    facts_of,
    values_differ,
)
from automodel_fn.testing._twin import twin_of


def check_cast_exact(model: nn.Module, dtype: torch.dtype, **plan_options: Any) -> None:
    """Law: a cast changes what it must, to the bits of `tensor.to`, and touches nothing else.

    An fp32 pin is the same object on the same storage with the same bits; so is all that is no
    kind that is cast. What becomes of which tensor is worked out again, in a slow and obvious way,
    and compared with the plan.

    Args:
        model: A model; it is not changed, a copy is cast.
        dtype: The target dtype.
        plan_options: Options of `cast_plan`: keep_fp32, skip, match (not "hf"), buffers.

    Raises:
        AssertionError: It does not hold; the message lists the tensors.

    Example:
        >>> check_cast_exact(nn.Linear(2, 2), torch.bfloat16, keep_fp32="bias")
    """
    twin = twin_of(model)
    cases = expected_cast(twin, dtype, **plan_options)
    before, expected = facts_of(twin), facts_after(twin, targets_of(cases))
    plan = cast_plan(twin, dtype, **plan_options)
    demand_none("the plan is not what the rules ask for", disagreements(plan, cases))
    apply(plan, twin)
    after = facts_of(twin)
    demand_none("the cast is not exact", values_differ(after, expected))
    untouched = {name for name, fact in before.items() if fact.dtype == expected[name].dtype}
    demand_none("a tensor that had to stay was touched", _differ_in(after, before, untouched))
    replaced = (name for name in before if after[name].tensor is not before[name].tensor)
    demand_none("these names stand for other tensor objects than before", replaced)


def _differ_in(found: Facts, expected: Facts, names: set[str]) -> Iterator[str]:
    yield from all_differs(
        {name: fact for name, fact in found.items() if name in names},
        {name: fact for name, fact in expected.items() if name in names},
    )


def check_aliases_kept(model: nn.Module, dtype: torch.dtype, **plan_options: Any) -> None:
    """Law: after a cast the same names are one tensor, and the same tensors share memory.

    Views of one storage also keep their places in it, so that a write through one shows in the
    others where it did before.

    Args:
        model: A model; it is not changed, a copy is cast.
        dtype: The target dtype.
        plan_options: Options of `cast_plan`.

    Raises:
        AssertionError: A tie, a shared buffer or a shared storage was split or made.

    Example:
        >>> model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        >>> model[1].weight = model[0].weight
        >>> check_aliases_kept(model, torch.bfloat16)
    """
    twin = twin_of(model)
    before = facts_of(twin)
    apply(cast_plan(twin, dtype, **plan_options), twin)
    demand_aliases(facts_of(twin), before)


def demand_aliases(after: Facts, before: Facts) -> None:
    """Raise if names that were one tensor or one storage are so no longer, or the reverse.

    Raises:
        AssertionError: With the names.
    """
    demand(set(after) == set(before), "the cast added or removed names")
    names = list(before)
    for i, one in enumerate(names):
        for other in names[i + 1 :]:
            demand_none(f"{one} and {other}", _torn(one, other, after, before))


def _torn(one: str, other: str, after: Facts, before: Facts) -> Iterator[str]:
    was_tied = before[one].tensor is before[other].tensor
    if was_tied != (after[one].tensor is after[other].tensor):
        yield "were one tensor and are no longer" if was_tied else "became one tensor"
    did_share = _share(one, other, before)
    if did_share != _share(one, other, after):
        yield "shared one storage and do no longer" if did_share else "came to share one storage"
    elif did_share and not was_tied and _placed(one, other, before) != _placed(one, other, after):
        yield "lie otherwise in their shared storage than before"


def _share(one: str, other: str, facts: Facts) -> bool:
    left, right = facts[one], facts[other]
    if not (left.storage and right.storage and left.tensor.numel() and right.tensor.numel()):
        return left.tensor is right.tensor
    return left.storage == right.storage


def _placed(one: str, other: str, facts: Facts) -> tuple[object, ...]:
    left, right = facts[one], facts[other]
    return right.offset - left.offset, left.stride, right.stride, left.shape, right.shape
