"""Laws of a cast: what it casts is cast exactly, and what belongs together stays together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from automodel_fn.cast._planners import cast_plan
from automodel_fn.plans import apply
from automodel_fn.testing._expected import (
    disagreements,
    expected_cast,
    facts_after,
    losses_after,
    targets_of,
)
from automodel_fn.testing._facts import (
    Facts,
    all_differs,
    demand,
    demand_none,
    facts_of,
    objects_differ,
    values_differ,
)
from automodel_fn.testing._twin import is_plain, storage_key, twin_of


def check_cast_exact(model: nn.Module, dtype: torch.dtype, **plan_options: Any) -> None:
    """Law: a cast changes what it must, to the bits of `tensor.to`, and touches nothing else.

    An fp32 pin is the same object on the same storage with the same bits, and no operator reads it;
    so is all that is no kind that is cast. Tensors, gradients, attributes and hooks stay the same
    objects. What becomes of which tensor, and what leaves the range of float16, is worked out
    again, in a slow and obvious way, and compared with the plan and the report.

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
    losses = losses_after(cases)
    plan = cast_plan(twin, dtype, **plan_options)
    demand_none("the plan is not what the rules ask for", disagreements(plan, cases))
    with _Watch() as watch:
        report = apply(plan, twin)
    after = facts_of(twin)
    demand_none("the cast is not exact", values_differ(after, expected))
    untouched = {name for name, fact in before.items() if fact.dtype == expected[name].dtype}
    demand_none("a tensor that had to stay was touched", _differ_in(after, before, untouched))
    demand_none("a cast must not read what stays", watch.read_of(before, untouched))
    demand_same_objects(after, before)
    demand_none("strides", _strides_differ(after, before, expected, untouched))
    counted = sorted((loss.num_infinite, loss.num_zero) for loss in report.range_losses)
    demand(counted == losses, f"{losses} must leave the range of float16, counted are {counted}")


def demand_same_objects(after: Facts, before: Facts) -> None:
    """Raise if a name, a gradient, an attribute or a hook is another object than before.

    Raises:
        AssertionError: With the names.
    """
    demand_none("not the objects that were there before", objects_differ(after, before))


class _Watch(TorchDispatchMode):
    """Note every storage that an operator is given."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tree_leaves((args, kwargs))
        plain = (t for t in given if isinstance(t, torch.Tensor) and is_plain(t))
        self._seen.update(storage_key(tensor) for tensor in plain)
        return func(*args, **(kwargs or {}))

    def read_of(self, before: Facts, names: set[str]) -> Iterator[str]:
        """Those of the names whose storage was given to an operator."""
        for name in names:
            if before[name].storage in self._seen and before[name].tensor.numel():
                yield f"{name} was given to an operator"


def _strides_differ(
    after: Facts, before: Facts, expected: Facts, untouched: set[str]
) -> Iterator[str]:
    """Strides are those of `tensor.to`; in a shared storage they are those of before."""
    for name, fact in after.items():
        if name in untouched or not fact.storage:
            continue
        shares = any(
            _share(name, other, before) and before[other].tensor is not before[name].tensor
            for other in before
        )
        wanted = (before if shares else expected)[name].stride
        if fact.stride != wanted:
            yield f"{name} has the strides {fact.stride}, expected {wanted}"


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
