"""Law of the temporary cast: inside one dtype, afterwards every bit that was not edited."""

from __future__ import annotations

import torch
from torch import nn

from automodel_fn.cast._temporary import temporary_cast
from automodel_fn.testing._expected import (
    expected_cast,
    expected_uniform,
    facts_after,
    targets_of,
)
from automodel_fn.testing._facts import Facts, demand, demand_none, facts_of, values_differ
from automodel_fn.testing._laws_cast import demand_aliases, demand_same_objects
from automodel_fn.testing._twin import tensors_of, twin_of


class _Injected(Exception):
    pass


def check_temporary_cast(
    model: nn.Module, dtype: torch.dtype, then: torch.dtype | None = None
) -> None:
    """Law: inside, every float is in `dtype`; afterwards all is as it was, but for what was edited.

    Tried with a block that does nothing, with one that raises, and with one that edits the first
    element of every tensor that was cast; with `then`, the dtypes afterwards are those of
    `cast_plan(model, then)`, made from the bits of before.

    Args:
        model: A model; it is not changed, copies are cast.
        dtype: The dtype inside.
        then: The dtype afterwards, instead of every tensor's own.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> check_temporary_cast(nn.Linear(2, 2).bfloat16(), torch.float32)
    """
    for raises in (False, True):
        twin = twin_of(model)
        before = facts_of(twin)
        expected = _expected_after(twin, then)
        _run_block(twin, dtype, then, raises)
        after = facts_of(twin)
        demand_none("after a temporary cast the model is another", values_differ(after, expected))
        demand_aliases(after, before)
        demand_same_objects(after, before)
    if then is None:
        _check_edits(model, dtype)


def _expected_after(twin: nn.Module, then: torch.dtype | None) -> Facts:
    return (
        facts_of(twin) if then is None else facts_after(twin, targets_of(expected_cast(twin, then)))
    )


def _run_block(twin: nn.Module, dtype: torch.dtype, then: torch.dtype | None, raises: bool) -> None:
    before = facts_of(twin)
    inside = facts_after(twin, targets_of(expected_uniform(twin, dtype)))
    try:
        with temporary_cast(twin, dtype, then) as given:
            demand(given is twin, "temporary_cast gave another model than it was given")
            found = facts_of(twin)
            demand_none("inside a temporary cast", values_differ(found, inside))
            demand_aliases(found, before)
            demand_same_objects(found, before)
            if raises:
                raise _Injected
    except _Injected:
        return
    demand(not raises, "temporary_cast swallowed an exception")


def _check_edits(model: nn.Module, dtype: torch.dtype) -> None:
    """A twin that is edited in its own dtype is what must come out."""
    twin, wanted = twin_of(model), twin_of(model)
    own = {name: tensor.dtype for name, tensor in tensors_of(wanted)}
    cast = [
        case.paths[0].raw_name
        for case in expected_uniform(twin, dtype)
        if case.to_dtype != case.tensor.dtype
    ]
    with temporary_cast(twin, dtype), torch.no_grad():
        inside, outside = dict(tensors_of(twin)), dict(tensors_of(wanted))
        for name in cast:
            tensor = inside[name]
            # An expanded tensor has memory of its own for each element once it is cast.
            if tensor.numel() and not tensor.is_meta and 0 not in outside[name].stride():
                place = (0,) * tensor.dim()
                value = 5.0 if tensor[place] == 3.0 else 3.0
                tensor[place], outside[name][place] = value, value
    demand(
        {name: tensor.dtype for name, tensor in tensors_of(twin)} == own,
        "after edits inside a temporary cast the dtypes are others",
    )
    found, expected = facts_of(twin), facts_of(wanted)
    demand_none("edits inside a temporary cast", values_differ(found, expected))
