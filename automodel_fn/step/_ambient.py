"""The one carrier of the ambient step: entering, reading, and taking it along.

Eager code reads a `ContextVar`: each thread and each asyncio task has its own. Code inside a
backward reads the step of the forward that it works for (see `_autograd`). Compiled code cannot
read a `ContextVar` and reads a thread-local mirror, which Dynamo guards; while a scope that was
entered inside an asyncio task is open, the mirror is off, since tasks share their thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from contextvars import ContextVar
from functools import wraps
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import attrs
import torch

from automodel_fn.errors import ConfigError, ScopeError
from automodel_fn.step._autograd import (
    Evaluation,
    Timeline,
    check_torch,
    evaluation,
    forward_step,
    hand_to_autograd,
    next_node,
)
from automodel_fn.step._context import OFF, StepContext

P = ParamSpec("P")
R = TypeVar("R")

_UNSET: Any = object()
_STEPS = {
    (first, optim): StepContext(first, optim_step=optim)
    for first in (None, True, False)
    for optim in (True, False)
}


@attrs.define(eq=False)
class _Entry:
    """One entered scope; a linked list, innermost first."""

    step: StepContext
    parent: _Entry | None
    evaluation: Evaluation | None
    task_scopes: set[_Entry] | None
    thread: int
    is_open: bool = True


class _Thread(threading.local):
    """What a thread's compiled code and its backwards see of its scopes."""

    def __init__(self) -> None:
        # Set here and not on the class: Dynamo would take a class attribute for a constant.
        self.mirror: _Entry | None = None
        self.published: _Entry | None = None
        self.task_scopes: set[_Entry] = set()
        self.first_task_node = 0
        self.have_tasks_taken_turns = False
        self.timeline: Timeline | None = None
        self.is_handed = False


_innermost: ContextVar[_Entry | None] = ContextVar("automodel_fn_step", default=None)
_thread = _Thread()


def _open_entry() -> _Entry | None:
    """The innermost open scope of this thread or task.

    Where it is not the one that this thread published last, tasks have taken turns unnoticed.
    """
    entry = _innermost.get()
    while entry is not None and not entry.is_open:
        entry = entry.parent
    if entry is not _thread.published:
        if _thread.task_scopes:
            _thread.have_tasks_taken_turns = True
        if _thread.timeline is not None:
            _thread.timeline.doubt(_thread.first_task_node if _thread.task_scopes else None)
        _publish(entry)
    return entry


def _publish(entry: _Entry | None) -> None:
    if not _thread.task_scopes:
        _thread.have_tasks_taken_turns = False
    step = OFF if entry is None or _thread.have_tasks_taken_turns else entry.step
    is_foreign = entry is not None and entry.thread != threading.get_ident()
    _thread.published = entry
    _thread.mirror = None if _thread.task_scopes or is_foreign else entry
    if _thread.timeline is None:
        check_torch()
        _thread.timeline = Timeline()
    if not _thread.is_handed and evaluation() is None:
        hand_to_autograd(_thread.timeline)
        _thread.is_handed = True
    _thread.timeline.record(step)


def _change_to(entry: _Entry | None) -> None:
    _innermost.set(entry)
    _publish(entry)


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
        mirror = _thread.mirror
        return OFF if mirror is None or not mirror.is_open else mirror.step
    return _step_at(_open_entry(), evaluation())


def _step_at(entry: _Entry | None, now: Evaluation | None) -> StepContext:
    """The step in force where `entry` is the innermost scope; in a backward, only if of there."""
    if now is None or (entry is not None and entry.evaluation == now):
        return OFF if entry is None else entry.step
    return forward_step(now)


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
        self._entry: _Entry | None = None

    def __enter__(self) -> StepContext:
        if self._entry is not None:
            raise ScopeError("this step_context is entered already; make a new one for each with.")
        parent, now = _open_entry(), evaluation()
        inherited = _step_at(parent, now)
        first, optim = self._first_microbatch, self._optim_step
        step = _STEPS[
            inherited.first_microbatch if first is _UNSET else first,
            inherited.optim_step if optim is _UNSET else optim,
        ]
        task_scopes = None if asyncio._get_running_loop() is None else _thread.task_scopes
        entry = self._entry = _Entry(step, parent, now, task_scopes, threading.get_ident())
        if task_scopes is not None:
            if not task_scopes:
                _thread.first_task_node = next_node()
            task_scopes.add(entry)
        _change_to(entry)
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
        innermost = _open_entry()
        in_order = innermost is entry
        is_closed_generator = not in_order and exc_type is GeneratorExit
        ended = (entry,) if is_closed_generator else _down_to(innermost, entry)
        for scope in ended or (entry,):
            scope.is_open = False
            if scope.task_scopes is not None:
                scope.task_scopes.discard(scope)
        while innermost is not None and not innermost.is_open:
            innermost = innermost.parent
        _change_to(innermost)
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


def _down_to(innermost: _Entry | None, entry: _Entry) -> tuple[_Entry, ...]:
    """The open scopes from the innermost down to `entry`; empty if it is not among them."""
    chain: list[_Entry] = []
    while innermost is not None:
        if innermost.is_open:
            chain.append(innermost)
        if innermost is entry:
            return tuple(chain)
        innermost = innermost.parent
    return ()


def _misuse(step: StepContext, num_ended: int) -> str:
    if not num_ended:
        return f"the scope of {step} was left in another thread or task than it was entered in."
    return (
        f"scopes were left out of order: that of {step} before {num_ended - 1} entered inside it; "
        "all of them are ended. Leave scopes in the reverse order, with nested with blocks."
    )


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
    step = current_step()

    @wraps(function)
    def bound(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return function(*args, **kwargs)
        with step_context(step):
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
