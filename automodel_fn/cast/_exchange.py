"""Exchange the data of many tensors, all or nothing. The one place that assigns `.data`.

`tensor.data = new` keeps the tensor object: parameters keep their ties, hooks, attributes and
optimizer references, buffers stay one object under all their names. It reaches no operator and
allocates nothing, so what can fail is making the new data, and an interruption in between. A
DTensor stays the same object too, but is given its new content in another way.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import Any

import attrs
import torch
from torch.distributed.tensor import DTensor

from automodel_fn.cast._dtensors import swap_content
from automodel_fn.cast._sharded import Shards, insist
from automodel_fn.errors import PartialCastError, itemized

_TRIES = 64


@attrs.frozen
class Exchange:
    """New data for tensors that get it together: views of one storage, or many small tensors.

    Args:
        names: What the tensors are, for messages.
        tensors: The tensors that get new data.
        make: Makes the new data, one for each tensor; called again if it was interrupted.
        num_bytes: Size of the new data, or of the largest of its parts.
        can_finish: Whether it may be finished when interrupted, since it takes less memory than
            what it replaces; otherwise its original is kept until the first that may.
        parts: The same as exchanges that need less memory each; None if there are none.
    """

    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...] = attrs.field(kw_only=True)
    make: Callable[[], tuple[torch.Tensor, ...]] = attrs.field(kw_only=True)
    num_bytes: int = attrs.field(kw_only=True)
    can_finish: bool = attrs.field(kw_only=True)
    parts: Callable[[], tuple[Exchange, ...]] | None = attrs.field(default=None, kw_only=True)


Originals = tuple[tuple[torch.Tensor, ...], ...]
"""What was there before: for each exchange its tensors' data."""


def exchange(
    exchanges: Sequence[Exchange],
    shards: Shards | None = None,
    *,
    keep_originals: bool = False,
    must_finish: bool = False,
) -> Originals:
    """Carry out all exchanges or none.

    Those that cannot be finished come first, with their originals kept; then one by one, each
    original released as soon as its exchange is done. An error or interruption rolls back as long
    as every original is there, and afterwards everything is finished before it is raised again.

    Args:
        exchanges: What to do.
        shards: The sharded side of the model. If there is one, every original is kept until all
            ranks are done.
        keep_originals: Keep every original, so that any interruption rolls back.
        must_finish: Never roll back: where what was there before is the wrong state to be in.

    Returns:
        The originals in the order of `exchanges`, if they are kept; else nothing.

    Raises:
        PartialCastError: An interrupted run could be neither rolled back nor finished.
    """
    order = sorted(range(len(exchanges)), key=lambda i: exchanges[i].can_finish)
    keeps = keep_originals or (shards is not None and shards.are_any)
    run = _Run([exchanges[i] for i in order], keeps, must_finish)
    # Once for all, and where no interrupt can leave gradients off.
    with interrupts_deferred() as check_interrupt, torch.no_grad():
        run.reserve()
        if shards is not None:
            shards.begin(tensor for item in exchanges for tensor in item.tensors)
        try:
            while run.num_done < len(order):
                if not must_finish:
                    check_interrupt()
                run.advance()
            if shards is not None:
                shards.refresh()
            if keeps:
                check_interrupt()
            if shards is not None:
                shards.confirm()
        except BaseException:
            run.settle()
            if shards is not None:
                shards.settled(is_finished=must_finish)
            raise
    if not keep_originals:
        return ()
    kept = dict(zip(order, run.originals, strict=True))
    return tuple(kept[i] for i in range(len(order)))


class _Run:
    """The state of one run; every step can be repeated after an interruption."""

    def __init__(self, exchanges: list[Exchange], keep_originals: bool, must_finish: bool) -> None:
        self._exchanges = exchanges
        self._keep = keep_originals
        self._has_released = must_finish
        self._fresh: tuple[int, tuple[torch.Tensor, ...]] | None = None
        self._reserve: list[torch.Tensor] = []
        self.num_done = 0
        self.originals: list[tuple[torch.Tensor, ...]] = []

    def reserve(self) -> None:
        """Set memory aside for the largest exchange that may have to be finished, per device."""
        if self._keep or self._has_released:
            return
        sizes: dict[torch.device, int] = {}
        for item in self._exchanges:
            device = item.tensors[0].device
            if item.can_finish and device.type != "meta":
                sizes[device] = max(sizes.get(device, 0), item.num_bytes)
        self._reserve = [
            torch.empty(size, dtype=torch.uint8, device=device) for device, size in sizes.items()
        ]

    def advance(self) -> None:
        """Do the next exchange."""
        item = self._exchanges[self.num_done]
        if len(self.originals) == self.num_done and not self._has_released:
            self.originals.append(tuple(tensor.data for tensor in item.tensors))
        if self._fresh is None or self._fresh[0] != self.num_done:
            self._fresh = self.num_done, item.make()
        _assign(item.tensors, self._fresh[1])
        if item.can_finish and not self._keep:
            self._has_released = True
            self.originals.clear()
        self.num_done += 1
        self._fresh = None

    def settle(self) -> None:
        """After an interruption: roll back, or finish if an original is gone already."""
        if not self._has_released:
            for item, original in zip(self._exchanges, self.originals, strict=False):
                insist(partial(_assign, item.tensors, original))
            return
        self._reserve.clear()
        self._divide()
        failures = 0
        while self.num_done < len(self._exchanges):
            try:
                self.advance()
            except BaseException as error:
                failures += 1
                if failures == _TRIES:
                    raise self._stuck() from error

    def _divide(self) -> None:
        """Go on in the smallest steps; what is made already may be half in place."""
        first = self.num_done + (self._fresh is not None)
        left = self._exchanges[first:]
        self._exchanges[first:] = [
            p for item in left for p in (item.parts or (lambda i=item: (i,)))()
        ]

    def _stuck(self) -> PartialCastError:
        left = [name for item in self._exchanges[self.num_done :] for name in item.names]
        return PartialCastError(
            itemized(
                f"an interrupted cast could not be finished; {len(left)} tensors are as before:",
                left,
                "Free memory and plan again with cast_plan.",
            )
        )


def _assign(tensors: tuple[torch.Tensor, ...], data: tuple[torch.Tensor, ...]) -> None:
    for tensor, new in zip(tensors, data, strict=True):
        if isinstance(tensor, DTensor):
            swap_content(tensor, new)
        else:
            tensor.data = new


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
