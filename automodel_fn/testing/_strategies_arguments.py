"""Strategies for what is given to the planners and to step scopes."""

from __future__ import annotations

import re

from hypothesis import strategies as st
from torch import nn

from automodel_fn.step._context import StepContext
from automodel_fn.testing._oracle import cases_of


def step_contexts() -> st.SearchStrategy[StepContext]:
    """Every StepContext; off is the simplest.

    Example:
        >>> from hypothesis import find
        >>> find(step_contexts(), lambda step: step.optim_step)
        StepContext(first_microbatch=None, optim_step=True)
    """
    return st.builds(StepContext, st.sampled_from((None, True, False)), optim_step=st.booleans())


def pin_patterns(model: nn.Module) -> st.SearchStrategy[tuple[str, ...]]:
    """Values of `keep_fp32=` and `skip=` that fit a model: FQNs, modules, globs, expressions.

    Each pattern matches something, so that it is no error; () is the simplest.

    Args:
        model: The model whose tensors and modules are named.

    Example:
        >>> from hypothesis import find
        >>> find(pin_patterns(nn.Linear(1, 1)), lambda value: "re:weight" in value)
        ('re:weight',)
    """
    spellings = [
        name
        for case in cases_of(model)
        for path in case.paths
        for name in (path.name(), path.raw_name)
    ]
    if not spellings:
        return st.just(())
    named = dict.fromkeys(
        ".".join(name.split(".")[:end])
        for name in spellings
        for end in range(1, name.count(".") + 2)
    )
    one = st.sampled_from(tuple(named)).flatmap(_ways_to_say)
    return st.lists(one, max_size=3).map(tuple)


def _ways_to_say(name: str) -> st.SearchStrategy[str]:
    last = name.rpartition(".")[2]
    return st.sampled_from((name, f"re:{re.escape(name)}", f"*{last}", f"{name[:-1]}?", "*"))
