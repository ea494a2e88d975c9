"""Where the ambient step is kept: a linked list of scopes, and what a thread shows of it.

Eager code finds its innermost scope in a `ContextVar`: each thread and each asyncio task has its
own. What compiled code and backwards may see is published by thread: a mirror, which Dynamo guards,
and a timeline (see `_autograd`). While a scope that was entered inside an asyncio task is open, the
mirror is off, since tasks share their thread.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar

import attrs

from automodel_fn.step._autograd import (
    Evaluation,
    Timeline,
    check_torch,
    evaluation,
    forward_step,
    hand_to_autograd,
)
from automodel_fn.step._context import OFF, StepContext


@attrs.define(eq=False)
class Entry:
    """One entered scope; a linked list, innermost first."""

    step: StepContext
    parent: Entry | None
    evaluation: Evaluation | None
    task_scopes: set[Entry] | None
    thread: int
    is_open: bool = True


NOWHERE = Entry(OFF, None, None, None, 0)
"""No scope, in what compiled code reads: of the type of one, so that it costs no further graph."""


class _Thread(threading.local):
    """What a thread's compiled code and its backwards see of its scopes."""

    def __init__(self) -> None:
        # Set here and not on the class: Dynamo would take a class attribute for a constant.
        self.base = NOWHERE
        self.mirror = NOWHERE
        self.published: Entry | None = None
        self.task_scopes: set[Entry] = set()
        self.first_task_node = 0
        self.have_tasks_taken_turns = False
        self.timeline: Timeline | None = None
        self.is_handed = False


_innermost: ContextVar[Entry | None] = ContextVar("automodel_fn_step", default=None)
this_thread = _Thread()


def open_entry() -> Entry | None:
    """The innermost open scope of this thread or task.

    Where it is not the one that this thread published last, tasks have taken turns unnoticed.
    """
    entry = _innermost.get()
    while entry is not None and not entry.is_open:
        entry = entry.parent
    if entry is not this_thread.published:
        if this_thread.task_scopes:
            this_thread.have_tasks_taken_turns = True
        if this_thread.timeline is not None:
            this_thread.timeline.doubt(
                this_thread.first_task_node if this_thread.task_scopes else None
            )
        _publish(entry)
    return entry


def _publish(entry: Entry | None) -> None:
    if not this_thread.task_scopes:
        this_thread.have_tasks_taken_turns = False
    outside = this_thread.base
    step = OFF if this_thread.have_tasks_taken_turns else (entry or outside).step
    is_foreign = entry is not None and entry.thread != threading.get_ident()
    this_thread.published = entry
    this_thread.mirror = (
        NOWHERE if this_thread.task_scopes or is_foreign else outside if entry is None else entry
    )
    if this_thread.timeline is None:
        check_torch()
        this_thread.timeline = Timeline()
    if not this_thread.is_handed and evaluation() is None:
        hand_to_autograd(this_thread.timeline)
        this_thread.is_handed = True
    this_thread.timeline.record(step)


def change_to(entry: Entry | None) -> None:
    _innermost.set(entry)
    _publish(entry)


def base_step() -> StepContext:
    """The step of this thread outside of every scope."""
    return this_thread.base.step


def change_base(step: StepContext) -> None:
    """Change the step outside of every scope; only where no scope is open."""
    assert this_thread.published is None
    this_thread.base = NOWHERE if step == OFF else Entry(step, None, None, None, 0)
    _publish(None)


def step_at(entry: Entry | None, now: Evaluation | None) -> StepContext:
    """The step in force where `entry` is the innermost scope; in a backward, only if of there."""
    if now is None or (entry is not None and entry.evaluation == now):
        return this_thread.base.step if entry is None else entry.step
    return forward_step(now)


def down_to(innermost: Entry | None, entry: Entry) -> tuple[Entry, ...]:
    """The open scopes from the innermost down to `entry`; empty if it is not among them."""
    chain: list[Entry] = []
    while innermost is not None:
        if innermost.is_open:
            chain.append(innermost)
        if innermost is entry:
            return tuple(chain)
        innermost = innermost.parent
    return ()
