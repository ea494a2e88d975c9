"""Where the ambient step is kept: a linked list of scopes, and what a thread shows of it.

Eager code finds its innermost scope in a `ContextVar`: each thread and each asyncio task has its
own. What compiled code and backwards may see is published by thread: a mirror, which Dynamo guards,
and a timeline (see `_autograd`). While a scope that was entered inside an asyncio task is open, the
mirror is off, since tasks share their thread.
"""

from __future__ import annotations

import threading
from contextvars import ContextVar

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


class Entry:
    """One entered scope; a linked list, innermost first.

    Attributes:
        step: Its step.
        parent: The scope that it was entered in.
        evaluation: The node evaluation that it was entered in.
        task_scopes: Where it is noted, if it was entered in an asyncio task.
        shown: What the thread shows that entered it; None outside of every scope.
        microbatch: The number of the microbatch that it belongs to: one of its own, or that of
            the scope which it has its `first_microbatch` from.
        is_open: Whether it was not left.
    """

    __slots__ = ("evaluation", "is_open", "microbatch", "parent", "shown", "step", "task_scopes")

    step: StepContext
    parent: Entry | None
    evaluation: Evaluation | None
    task_scopes: set[Entry] | None
    shown: Shown | None
    microbatch: int
    is_open: bool


def _outermost(step: StepContext) -> Entry:
    entry = Entry()
    entry.step, entry.shown, entry.is_open = step, None, True
    return entry


NOWHERE = _outermost(OFF)
"""Outside of every scope."""
ENDED = Entry()
"""Published in the place of a scope that was left elsewhere: no scope is this one."""


class Shown:
    """What a thread's compiled code and its backwards see of its scopes.

    Compiled code reads `mirror`: a step, and no scope, so that nothing else of a scope is guarded.
    Eager code reads `step`, where `published` is its innermost scope. `thread` is the number of the
    thread, None after its end.
    One object a thread: a thread-local attribute takes longer to read than any other.
    """

    def __init__(self) -> None:
        # Set here and not on the class: Dynamo would take a class attribute for a constant.
        self.thread: int | None = threading.get_ident()
        self.base = NOWHERE
        self.mirror = OFF
        self.published: Entry | None = None
        self.step = OFF
        self.task_scopes: set[Entry] = set()
        self.first_task_node = 0
        self.have_tasks_taken_turns = False
        self.timeline = Timeline()
        # Those of the timeline, for the usual case that no node was made since the last change.
        self.starts, self.steps = self.timeline.starts, self.timeline.steps
        self.is_handed = False


class _Ending:
    """Goes with its thread, whose number another one may get."""

    def __init__(self, shown: Shown) -> None:
        self._shown = shown

    def __del__(self) -> None:
        self._shown.thread = None


class _Thread(threading.local):
    def __init__(self) -> None:
        self.shown = Shown()
        self.ending = _Ending(self.shown)


innermost: ContextVar[Entry | None] = ContextVar("automodel_fn_step", default=None)
this_thread = _Thread()


def open_entry() -> Entry | None:
    """The innermost open scope of this thread or task.

    Where it is not the one that this thread published last, tasks have taken turns unnoticed.
    """
    entry, shown = innermost.get(), this_thread.shown
    while entry is not None and not entry.is_open:
        entry = entry.parent
    if entry is not shown.published:
        if shown.task_scopes:
            shown.have_tasks_taken_turns = True
        shown.timeline.doubt(shown.first_task_node if shown.task_scopes else None)
        show(shown, entry)
    return entry


def show(shown: Shown, entry: Entry | None) -> None:
    """Let compiled code and backwards of a thread see `entry` as its innermost scope."""
    shown.published = entry
    if shown.task_scopes or not shown.is_handed:
        _show_otherwise(shown, entry or shown.base)
        return
    step = shown.step = shown.base.step if entry is None else entry.step
    shown.mirror = step if entry is None or entry.shown is shown else OFF
    if shown.starts[-1] == next_node():
        shown.steps[-1] = step
    else:
        shown.timeline.record(step)


def _show_otherwise(shown: Shown, scope: Entry) -> None:
    """The first time in a thread, in a backward, or among asyncio tasks."""
    shown.step = scope.step
    is_foreign = scope.shown is not None and scope.shown is not shown
    shown.mirror = OFF if shown.task_scopes or is_foreign else scope.step
    if not shown.is_handed and evaluation() is None:
        check_torch()
        hand_to_autograd(shown.timeline)
        shown.is_handed = True
    have_tasks_taken_turns = shown.task_scopes and shown.have_tasks_taken_turns
    shown.timeline.record(OFF if have_tasks_taken_turns else scope.step)


def end(entry: Entry) -> None:
    """Close a scope, whichever thread this is: the one that entered it shows it no more."""
    entry.is_open = False
    if entry.task_scopes is not None:
        entry.task_scopes.discard(entry)
    if entry.shown is not None and entry.shown.published is entry:
        entry.shown.published, entry.shown.mirror = ENDED, OFF


def base_step() -> StepContext:
    """The step of this thread outside of every scope."""
    return this_thread.shown.base.step


def change_base(step: StepContext) -> None:
    """Change the step outside of every scope; only where no scope is open."""
    shown = this_thread.shown
    assert shown.published is None
    shown.base = NOWHERE if step == OFF else _outermost(step)
    show(shown, None)


def step_at(entry: Entry | None, now: Evaluation | None) -> StepContext:
    """The step in force where `entry` is the innermost scope; in a backward, only if of there."""
    if now is None or (entry is not None and entry.evaluation == now):
        return this_thread.shown.base.step if entry is None else entry.step
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
