"""Which step a backward is working for: autograd's sequence numbers, and a table that travels.

Autograd numbers the nodes that a thread makes, in order, and carries a thread's Python objects
along to the threads that run its backward. So each thread that enters scopes keeps a timeline,
"from node number n on the step is s", and hands it to autograd once. When a checkpoint
recomputes its forward, the node under evaluation was made in that forward, and the timeline says
in which step.

All of this is private API of PyTorch (seen in 2.11 and 2.13); it is used in this file alone, and
`check_torch` fails with a clear line where a piece of it is missing.

Tested on the CPU and on an H100: right in a recompute for both checkpoint modes, in any order of
forwards and backwards, with nothing asked of the caller.
"""

from __future__ import annotations

import atexit
import ctypes
import sys
import threading
import time
import weakref
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any

import torch
import torch.autograd.graph

from automodel_fn.errors import BackendUnavailableError
from automodel_fn.step._context import OFF, StepContext

_KEY = "automodel_fn.step.timeline"
_MAX_BOUNDARIES = 4096
_ACCUMULATES = 2**64 - 1
"""The number of every gradient accumulation node: such a node belongs to no forward."""

_c: Any = torch._C

# Taken once: they are called in every forward. `check_torch` says so where one is missing.
current_node: Callable[[], Any] = getattr(_c, "_current_autograd_node", lambda: None)
"""The node under evaluation, None outside of a backward."""
next_node: Callable[[], int] = getattr(_c._autograd, "_get_sequence_nr", lambda: 0)
"""The number that this thread's next node will have."""

Evaluation = tuple[int, int]
"""One evaluation of one node: (number of the backward, number of the node)."""


class Timeline:
    """Which step was in force from which autograd node on, for the nodes of one thread.

    Only the newest 4096 boundaries are kept; what is older is off, never another step's.
    """

    __slots__ = ("starts", "steps", "thread")

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.starts: list[int] = []
        self.steps: list[StepContext] = []

    def record(self, step: StepContext) -> None:
        """From the next node on, `step` is in force."""
        start, starts = next_node(), self.starts
        if starts and starts[-1] == start:
            self.steps[-1] = step
            return
        if len(starts) >= _MAX_BOUNDARIES:
            half = _MAX_BOUNDARIES // 2
            del starts[:half], self.steps[:half]
        starts.append(start)
        self.steps.append(step)

    def doubt(self, since: int | None = None) -> None:
        """The nodes since the last boundary, or since `since`, may be of another step: off."""
        first = len(self.starts) - 1 if since is None else bisect_left(self.starts, since)
        for index in range(max(first, 0), len(self.steps)):
            self.steps[index] = OFF

    def at(self, sequence_number: int) -> StepContext:
        """The step in force when the node of that number was made."""
        index = bisect_right(self.starts, sequence_number) - 1
        return OFF if index < 0 else self.steps[index]


class _Handed:
    """What autograd holds for a thread, kept for ever: it may be a pointer without a reference.

    Args:
        timeline: That of this thread, in an entry that nobody else refers to.
    """

    __slots__ = ("_num_references", "_thread", "entry")

    def __init__(self, timeline: Timeline) -> None:
        self.entry = (timeline,)
        self._thread = weakref.ref(threading.current_thread())
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self.entry))
        _c._stash_obj_in_tls(_KEY, self.entry)
        self._num_references = sys.getrefcount(self.entry)

    def is_to_be_dropped(self) -> bool:
        """Whether the thread has ended, and autograd has not let go yet."""
        thread = self._thread()
        has_ended = thread is None or not thread.is_alive()
        return has_ended and sys.getrefcount(self.entry) >= self._num_references


_HANDED: list[_Handed] = []
_PATIENCE = 1.0
"""How many seconds the end of a program waits at most."""


@atexit.register
def _wait_for_ended_threads() -> None:
    """Let autograd drop what it holds for threads that have ended, before the interpreter ends.

    It does so when a thread has ended for Python already, and has to enter the interpreter for it.
    One that is ending itself lets nobody in, and PyTorch would abort the process.
    """
    end = time.monotonic() + _PATIENCE
    while any(handed.is_to_be_dropped() for handed in _HANDED) and time.monotonic() < end:
        time.sleep(0.001)


def check_torch() -> None:
    """Fail with a clear line if this PyTorch lacks what the recompute rule is built on.

    Raises:
        BackendUnavailableError: A private function that this file uses is gone.
    """
    wanted = {
        "torch._C": ("_current_autograd_node", "_current_graph_task_id", "_stash_obj_in_tls"),
        "torch._C._autograd": ("_get_sequence_nr",),
        "torch.autograd.graph": ("_engine_run_backward",),
    }
    homes: dict[str, Any] = {
        "torch._C": _c,
        "torch._C._autograd": _c._autograd,
        "torch.autograd.graph": torch.autograd.graph,
    }
    gone = [
        f"{home}.{name}"
        for home, names in wanted.items()
        for name in names
        if not hasattr(homes[home], name)
    ]
    if gone:
        raise BackendUnavailableError(
            f"torch={torch.__version__} lacks {', '.join(gone)}, which the step context is built "
            "on; use torch 2.11 to 2.13, or a newer automodel_fn."
        )


def hand_to_autograd(timeline: Timeline) -> None:
    """Let autograd carry `timeline` to the threads that run this thread's backwards.

    Once a thread and never replaced: torch 2.11 does not take a reference of its own but drops one
    when the entry goes, so an entry must stay, and one reference more is taken here.
    """
    if not _c._is_key_in_tls(_KEY):
        _HANDED.append(_Handed(timeline))


def evaluation() -> Evaluation | None:
    """The node evaluation that this code runs in, or None outside of a backward."""
    node = current_node()
    if node is None:
        return None
    return _c._current_graph_task_id(), node._sequence_nr()


def forward_step(current: Evaluation) -> StepContext:
    """The step of the forward that the node under evaluation was made in.

    Off where that cannot be known: the backward was called from a thread that never entered a
    scope, or it was begun by another backward (the inner part of nested reentrant checkpoints), so
    that its nodes are those of a recompute. A gradient accumulation node belongs to no forward:
    there it is the step in force where backward was called.
    """
    if not _c._is_key_in_tls(_KEY):
        return OFF
    timeline: Timeline = _c._get_obj_in_tls(_KEY)[0]
    if _is_begun_by_a_backward(timeline.thread):
        return OFF
    return timeline.at(current[1])


def _is_begun_by_a_backward(calling_thread: int) -> bool:
    """Whether more than one backward is under way, here and in the thread that called the first.

    One that is begun inside another may run here, in the thread that called the first, or, nested
    more than 60 deep, in a thread of the engine's pool; the callers wait in their stacks.
    """
    frames = sys._current_frames()
    try:
        if calling_thread not in frames:
            return True
        threads = {calling_thread, threading.get_ident()}
        return sum(_num_backwards(frames[thread]) for thread in threads) > 1
    finally:
        # It holds this very frame: a cycle that would keep every tensor in sight alive.
        frames.clear()


def _num_backwards(frame: FrameType | None) -> int:
    engine: CodeType = torch.autograd.graph._engine_run_backward.__code__
    calls = 0
    while frame is not None:
        calls += frame.f_code is engine
        frame = frame.f_back
    return calls
