"""Ctrl-C, kept waiting where it would leave a model half done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import FrameType
from typing import Any


@contextmanager
def interrupts_deferred() -> Generator[Callable[[], None]]:
    """Let Ctrl-C wait for a moment at which it can be dealt with.

    Yields a function that gives a waiting one to the program's own handler, which may raise; also
    in a deferral inside another one. What was not given so is given at the end. Python runs signal
    handlers in the main thread alone; anywhere else, and where the handler is not Python's, there
    is nothing to defer.
    """
    is_main = threading.current_thread() is threading.main_thread()
    previous: Any = signal.getsignal(signal.SIGINT) if is_main else None
    if previous is None:
        yield lambda: None
        return
    waiting: list[FrameType | None] = []
    own_handler = getattr(previous, "own_handler", previous)

    def note(signum: int, frame: FrameType | None) -> None:
        waiting.append(frame)

    def check() -> None:
        if waiting and callable(own_handler):
            own_handler(signal.SIGINT, waiting.pop())

    vars(note)["own_handler"] = own_handler
    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)
        if waiting:
            signal.raise_signal(signal.SIGINT)
