"""Enter a step context, and read the one in force."""

from __future__ import annotations

import asyncio
import itertools
from threading import get_ident
from types import TracebackType
from typing import Any

from torch.compiler import is_compiling

from automodel_fn.errors import ConfigError, ScopeError
from automodel_fn.step._autograd import current_node, evaluation, next_node
from automodel_fn.step._carrier import (
    Entry,
    down_to,
    end,
    innermost,
    open_entry,
    show,
    step_at,
    this_thread,
)
from automodel_fn.step._context import StepContext

_UNSET: Any = object()
_running_loop = asyncio._get_running_loop
_microbatches = itertools.count()
_STEPS = {
    first: {optim: StepContext(first, optim_step=optim) for optim in (True, False)}
    for first in (None, True, False)
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
    if is_compiling():
        return this_thread.shown.mirror
    return eager_step()


def eager_step() -> StepContext:
    """As `current_step`, for code that knows that it is not being compiled."""
    entry = innermost.get()
    # What every forward asks, in as few steps as can be: no backward, and nobody took turns. A
    # scope knows its thread, since a thread-local attribute takes longest of all to read.
    shown = this_thread.shown if entry is None else entry.shown
    if (
        shown is not None
        and shown.published is entry
        and (entry is None or shown.thread == get_ident())
        and current_node() is None
    ):
        return shown.step
    return step_at(open_entry(), evaluation())


def current_microbatch() -> int | None:
    """The number of the microbatch under way, unlike that of any other; None if there is none.

    Scopes that inherit `first_microbatch`, and what is called through `bind`, are of the microbatch
    of their scope. A recompute is of none, since it is no call of its own.
    """
    entry = open_entry()
    return None if entry is None or current_node() is not None else entry.microbatch


class step_context(Entry):
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

    # Its first scope is the object itself: a microbatch enters one, and makes nothing more.
    __slots__ = ("_first_microbatch", "_given", "_is_used", "_microbatch", "_optim_step", "_scope")

    def __init__(
        self,
        step: StepContext | None = None,
        *,
        first_microbatch: bool | None = _UNSET,
        optim_step: bool = _UNSET,
    ) -> None:
        if step is None:
            # By identity: this is done in every microbatch, and bool has no other instances.
            if (
                first_microbatch is not True
                and first_microbatch is not False
                and first_microbatch is not None
                and first_microbatch is not _UNSET
            ) or (optim_step is not _UNSET and optim_step is not True and optim_step is not False):
                raise _wrong_fields(first_microbatch, optim_step)
        elif type(step) is not StepContext or not (first_microbatch is optim_step is _UNSET):
            _check_step(step, first_microbatch, optim_step)
        self._given = step
        self._first_microbatch = first_microbatch
        self._optim_step = optim_step
        self._microbatch: int | None = None
        self._is_used = False
        self._scope: Entry | None = None

    def __enter__(self) -> StepContext:
        if self._scope is not None:
            raise ScopeError("this step_context is entered already; make a new one for each with.")
        shown, parent = this_thread.shown, innermost.get()
        if parent is not shown.published:
            parent = open_entry()
        now = None if current_node() is None else evaluation()
        step, microbatch = self._given, self._microbatch
        if step is None:
            outer = shown.step if now is None else step_at(parent, now)
            first, optim = self._first_microbatch, self._optim_step
            if first is _UNSET:
                first = outer.first_microbatch
                microbatch = None if parent is None else parent.microbatch
            step = _STEPS[first][outer.optim_step if optim is _UNSET else optim]
        task_scopes = None if _running_loop() is None else shown.task_scopes
        # A scope that was left may still be looked at by a task; it stays as it was.
        entry = self._scope = Entry() if self._is_used else self
        self._is_used = True
        entry.step = step
        entry.parent = parent
        entry.evaluation = now
        entry.task_scopes = task_scopes
        entry.shown = shown
        entry.microbatch = next(_microbatches) if microbatch is None else microbatch
        entry.is_open = True
        if task_scopes is not None:
            if not task_scopes:
                shown.first_task_node = next_node()
                shown.have_tasks_taken_turns = False
            task_scopes.add(entry)
        innermost.set(entry)
        show(shown, entry)
        return step

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        entry, self._scope = self._scope, None
        if entry is None:
            raise ScopeError("this step_context is not entered: left twice, or never entered.")
        shown = this_thread.shown
        if innermost.get() is not entry or shown.published is not entry:
            # Not one ended by a scope that was left out of order, which has been reported.
            if entry.is_open:
                _leave_otherwise(entry, exc_type)
            return
        entry.is_open = False
        parent = entry.parent
        if entry.task_scopes is not None:
            entry.task_scopes.discard(entry)
        if parent is not None and not parent.is_open:
            parent = _open_from(parent)
        innermost.set(parent)
        show(shown, parent)


def _leave_otherwise(entry: Entry, exc_type: type[BaseException] | None) -> None:
    """Leave a scope that is not the innermost, or not the one that its thread showed last."""
    here = open_entry()
    is_closed_generator = here is not entry and exc_type is GeneratorExit
    ended = (entry,) if is_closed_generator else down_to(here, entry)
    for scope in ended or (entry,):
        end(scope)
    here_now = _open_from(here)
    innermost.set(here_now)
    show(this_thread.shown, here_now)
    if here is not entry and not is_closed_generator:
        raise ScopeError(_misuse(entry.step, len(ended)))


def _open_from(entry: Entry | None) -> Entry | None:
    while entry is not None and not entry.is_open:
        entry = entry.parent
    return entry


def resumed(step: StepContext, microbatch: int | None) -> step_context:
    """A scope of a microbatch that is under way, or was, as `current_microbatch` told it."""
    scope = step_context(step)
    scope._microbatch = microbatch
    return scope


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


def _wrong_fields(first_microbatch: object, optim_step: object) -> ConfigError:
    if first_microbatch is None or first_microbatch is _UNSET or isinstance(first_microbatch, bool):
        return ConfigError(f"optim_step={optim_step!r} must be True or False.")
    return ConfigError(f"first_microbatch={first_microbatch!r} must be True, False or None (off).")


def _misuse(step: StepContext, num_ended: int) -> str:
    if not num_ended:
        return f"the scope of {step} was left in another thread or task than it was entered in."
    return (
        f"scopes were left out of order: that of {step} before {num_ended - 1} entered inside it; "
        "all of them are ended. Leave scopes in the reverse order, with nested with blocks."
    )
