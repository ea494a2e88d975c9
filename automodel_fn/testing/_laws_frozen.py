"""Law of the frozen plan: it is what a slow and obvious reading of the rules gives."""

from __future__ import annotations

import torch
from torch import nn

from automodel_fn.cast._planners import frozen_cast_plan
from automodel_fn.plans import apply
from automodel_fn.testing._expected import disagreements, expected_frozen, facts_after, targets_of
from automodel_fn.testing._facts import demand_none, facts_of, values_differ
from automodel_fn.testing._laws_cast import demand_aliases, demand_same_objects
from automodel_fn.testing._twin import twin_of


def check_frozen_plan(
    model: nn.Module, dtype: torch.dtype, mixed: str = "base", *, buffers: str = "all"
) -> None:
    """Law: frozen parts are cast, bit for bit as `tensor.to`; what is trained elsewhere never is.

    Every tensor is asked, one by one, whether any module above it has parameters and none that
    is trainable, and whether its owner mixes frozen weights with trainable ones.

    Args:
        model: A model with `requires_grad` set; it is not changed, a copy is cast.
        dtype: The compute dtype.
        mixed: "base", "all" or "none", as for `frozen_cast_plan`.
        buffers: "all", "persistent" or "none".

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 2))
        >>> check_frozen_plan(model, torch.bfloat16)
    """
    twin = twin_of(model)
    cases = expected_frozen(twin, dtype, mixed=mixed, buffers=buffers)
    before, expected = facts_of(twin), facts_after(twin, targets_of(cases))
    plan = frozen_cast_plan(twin, dtype, mixed=mixed, buffers=buffers)
    demand_none(f"the frozen plan (mixed={mixed!r})", disagreements(plan, cases))
    apply(plan, twin)
    after = facts_of(twin)
    demand_none(f"the frozen cast (mixed={mixed!r})", values_differ(after, expected))
    demand_aliases(after, before)
    demand_same_objects(after, before)
