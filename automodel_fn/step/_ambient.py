"""Enter a step context, and read the one in force."""

from __future__ import annotations

import asyncio
import threading
from types import TracebackType
from typing import Any

import torch

from automodel_fn.errors import ConfigError, ScopeError
from automodel_fn.step._autograd import evaluation, next_node
from automodel_fn.step._carrier import Entry, change_to, down_to, open_entry, step_at, this_thread
from automodel_fn.step._context import OFF, StepContext

_UNSET: Any = object()
_STEPS = {
    (first, optim): StepContext(first, optim_step=optim)
    for first in (None, True, False)
    for optim in (True, False)
}


def current_step() -> StepContext:
    """The step context in force here; off (`StepContext()`) outside of every scope.

    - In eager code: that of the innermost scope of this thread or asyncio task.
    - In a recompute of an activation checkpoint and in backward hooks: that of the forward, with
      nothing asked of the caller, also after the scope was left; off where it cannot be known (a
      backward called from a thread without scopes, the inner part of nested reentrant checkpoints)
      unless the function was given through `bind`.
    - In compiled code: that of its thread. No graph break, and guarded: never stale.

    Replaces `get_is_first_microbatch` and `get_is_optim_step` (NeMo Automodel).

    Example:
        >>> current_step()
        StepContext(first_microbatch=None, optim_step=False)
    """
    if torch.compiler.is_compiling():
        mirror = this_thread.mirror
        return mirror.step if mirror.is_open else OFF
    return step_at(open_entry(), evaluation())


class step_context:
    """Put a step context in force for a `with` block.

    Scoped and immutable: what stood before stands again afterwards, also after an error. Seen by
    this thread or asyncio task only; take it elsewhere with `bind`. Enter it outside of compiled
    code. Replaces `set_is_first_microbatch` and `set_is_optim_step` (NeMo Automodel), which leak
    into validation.

    Args:
        step: A StepContext that replaces all fields.
        first_microbatch: True, False or None (off); the enclosing scope's if it is not given.
        optim_step: True or False; the enclosing scope's if it is not given.

    Raises:
        ConfigError: Both a step and single fields, neither a value of its kind.
        ScopeError: On leaving: scopes left out of order (what stood before both stands again), or
            in another thread or task. A generator closed inside an inner scope raises nothing.

    Example:
        >>> with step_context(first_microbatch=True):
        ...     with step_context(optim_step=True):
        ...         current_step()
        StepContext(first_microbatch=True, optim_step=True)
    """

    __slots__ = ("_entry", "_first_microbatch", "_optim_step")

    def __init__(
        self,
        step: StepContext | None = None,
        *,
        first_microbatch: bool | None = _UNSET,
        optim_step: bool = _UNSET,
    ) -> None:
        if step is not None:
            _check_step(step, first_microbatch, optim_step)
            first_microbatch, optim_step = step.first_microbatch, step.optim_step
        else:
            _check_fields(first_microbatch, optim_step)
        self._first_microbatch = first_microbatch
        self._optim_step = optim_step
        self._entry: Entry | None = None

    def __enter__(self) -> StepContext:
        if self._entry is not None:
            raise ScopeError("this step_context is entered already; make a new one for each with.")
        parent, now = open_entry(), evaluation()
        inherited = step_at(parent, now)
        first, optim = self._first_microbatch, self._optim_step
        step = _STEPS[
            inherited.first_microbatch if first is _UNSET else first,
            inherited.optim_step if optim is _UNSET else optim,
        ]
        task_scopes = None if asyncio._get_running_loop() is None else this_thread.task_scopes
        entry = self._entry = Entry(step, parent, now, task_scopes, threading.get_ident())
        if task_scopes is not None:
            if not task_scopes:
                this_thread.first_task_node = next_node()
            task_scopes.add(entry)
        change_to(entry)
        return step

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        entry, self._entry = self._entry, None
        if entry is None:
            raise ScopeError("this step_context is not entered: left twice, or never entered.")
        if not entry.is_open:
            return  # ended by a scope that was left out of order, which has been reported
        innermost = open_entry()
        in_order = innermost is entry
        is_closed_generator = not in_order and exc_type is GeneratorExit
        ended = (entry,) if is_closed_generator else down_to(innermost, entry)
        for scope in ended or (entry,):
            scope.is_open = False
            if scope.task_scopes is not None:
                scope.task_scopes.discard(scope)
        while innermost is not None and not innermost.is_open:
            innermost = innermost.parent
        change_to(innermost)
        if not in_order and not is_closed_generator:
            raise ScopeError(_misuse(entry.step, len(ended)))


def _check_step(step: object, *fields: object) -> None:
    if not isinstance(step, StepContext):
        raise ConfigError(
            f"step={step!r} must be a StepContext; "
            "single fields are given by name, as in step_context(first_microbatch=True)."
        )
    if any(field is not _UNSET for field in fields):
        raise ConfigError(
            "step_context got both a step and single fields; "
            "give a StepContext, which replaces all fields, or first_microbatch= and optim_step=."
        )


def _check_fields(first_microbatch: object, optim_step: object) -> None:
    if not (
        first_microbatch is _UNSET or first_microbatch is None or isinstance(first_microbatch, bool)
    ):
        raise ConfigError(
            f"first_microbatch={first_microbatch!r} must be True, False or None (off)."
        )
    if not (optim_step is _UNSET or isinstance(optim_step, bool)):
        raise ConfigError(f"optim_step={optim_step!r} must be True or False.")


def _misuse(step: StepContext, num_ended: int) -> str:
    if not num_ended:
        return f"the scope of {step} was left in another thread or task than it was entered in."
    return (
        f"scopes were left out of order: that of {step} before {num_ended - 1} entered inside it; "
        "all of them are ended. Leave scopes in the reverse order, with nested with blocks."
    )
