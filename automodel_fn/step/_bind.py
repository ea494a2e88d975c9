"""Take the step context along, to where it is not found by itself."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

from automodel_fn.step._ambient import current_microbatch, current_step, resumed, step_context
from automodel_fn.step._context import StepContext

P = ParamSpec("P")
R = TypeVar("R")


def bind(function: Callable[P, R]) -> Callable[P, R]:
    """Take the step context of here along: `function` sees it wherever and whenever it is called.

    For another thread, an executor, a callback, or a function whose forward is recomputed where
    `current_step` cannot find it. Inside compiled code `bind` does nothing: there the step is that
    of the thread.

    Returns:
        A function with the same signature; it may be called often, nested, and from many threads.

    Example:
        >>> with step_context(first_microbatch=True):
        ...     later = bind(current_step)
        >>> later()
        StepContext(first_microbatch=True, optim_step=False)
    """
    if torch.compiler.is_compiling():
        return function
    step, microbatch = current_step(), current_microbatch()

    @wraps(function)
    def bound(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with resumed(step, microbatch):
            return function(*args, **kwargs)

    return bound


class _Recompute:
    """A context that enters the same step again and again, from any thread.

    A class and not a generator: `retain_graph=True` recomputes twice, and a generator is used up.
    """

    __slots__ = ("_entered", "_step")

    def __init__(self, step: StepContext) -> None:
        self._step = step
        self._entered: list[step_context] = []

    def __enter__(self) -> None:
        scope = step_context(self._step)
        scope.__enter__()
        self._entered.append(scope)

    def __exit__(self, *exc: Any) -> None:
        self._entered.pop().__exit__(*exc)


def checkpoint_context_fn() -> tuple[
    contextlib.AbstractContextManager[None], contextlib.AbstractContextManager[None]
]:
    """A `context_fn` for `torch.utils.checkpoint`: the recompute sees the forward's step.

    Needed only where `current_step` cannot find it by itself, as in a backward that is called from
    another Python thread. For `use_reentrant=False`; with True, `bind` the function.

    Returns:
        A context for the forward (which changes nothing) and one for its recompute.

    Example:
        >>> from functools import partial
        >>> from torch.utils.checkpoint import checkpoint
        >>> run = partial(checkpoint, use_reentrant=False, context_fn=checkpoint_context_fn)
    """
    return contextlib.nullcontext(), _Recompute(current_step())
