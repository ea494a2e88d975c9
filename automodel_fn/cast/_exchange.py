"""Exchange the data of many tensors, all or nothing. The one place that assigns `.data`.

`tensor.data = new` keeps the tensor object: parameters keep their ties, hooks, attributes and
optimizer references, buffers stay one object under all their names. It reaches no operator and
allocates nothing, so what can fail is making the new data, and an interruption in between. A
DTensor stays the same object too, but is given its new content in another way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, islice, pairwise

import attrs
import torch
from torch.distributed.tensor import DTensor

from automodel_fn.cast._convert import fetch_memory
from automodel_fn.cast._dtensors import swap_content
from automodel_fn.cast._interrupts import interrupts_deferred
from automodel_fn.cast._sharded import Shards, insist
from automodel_fn.errors import PartialCastError, itemized

_TRIES = 64


@attrs.frozen
class Exchange:
    """New data for tensors: for views of one storage together, for others step by step.

    Args:
        names: What the tensors are, for messages.
        tensors: The tensors that get new data.
        make: Makes the new data of the tensors from one place to another; called again if it was
            interrupted.
        ends: Where each step ends; the tensors of a step get their data together.
        num_bytes: Size of the new data of one tensor, the largest; of all, if it is not divisible.
        first_bytes: Size of the new data of the first step.
        can_finish: Whether it may be finished when interrupted, since it takes less memory than
            what it replaces; otherwise its original is kept until the first that may.
        is_divisible: Whether the tensors of a step can be given their data one by one.
    """

    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...] = attrs.field(kw_only=True)
    make: Callable[[int, int], tuple[torch.Tensor, ...]] = attrs.field(kw_only=True)
    ends: tuple[int, ...] = attrs.field(kw_only=True)
    num_bytes: int = attrs.field(kw_only=True)
    first_bytes: int = attrs.field(kw_only=True)
    can_finish: bool = attrs.field(kw_only=True)
    is_divisible: bool = attrs.field(kw_only=True)

    @classmethod
    def at_once(
        cls,
        names: tuple[str, ...],
        tensors: tuple[torch.Tensor, ...],
        make: Callable[[], tuple[torch.Tensor, ...]],
    ) -> Exchange:
        """One of a single step, whose originals are kept."""
        return cls(
            names,
            tensors=tensors,
            make=lambda start, stop: make(),
            ends=(len(tensors),),
            num_bytes=0,
            first_bytes=0,
            can_finish=False,
            is_divisible=False,
        )


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
    # Once for all, and where no interrupt can leave gradients off. What is made in inference mode
    # could never be trained.
    with interrupts_deferred() as check_interrupt, torch.inference_mode(False), torch.no_grad():
        run.reserve()
        if shards is not None:
            shards.begin(tensor for item in exchanges for tensor in item.tensors)
        try:
            while not run.is_done:
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
    kept = dict(zip(order, run.kept(), strict=True))
    return tuple(kept[i] for i in range(len(order)))


_Step = tuple[Exchange, int, int]


class _Run:
    """The state of one run; every step can be repeated after an interruption."""

    def __init__(self, exchanges: list[Exchange], keep_originals: bool, must_finish: bool) -> None:
        self._exchanges = exchanges
        self._steps: list[_Step] = [
            (item, start, stop) for item in exchanges for start, stop in pairwise((0, *item.ends))
        ]
        self._keep = keep_originals
        self._has_released = must_finish
        self._fresh: tuple[int, tuple[torch.Tensor, ...]] | None = None
        self._reserve: list[torch.Tensor] = []
        self._num_done = 0
        self._originals: list[tuple[torch.Tensor, ...]] = []

    @property
    def is_done(self) -> bool:
        return self._num_done == len(self._steps)

    def kept(self) -> Iterator[tuple[torch.Tensor, ...]]:
        """The originals of each exchange."""
        left = iter(self._originals)
        for item in self._exchanges:
            yield tuple(chain.from_iterable(islice(left, len(item.ends))))

    def reserve(self) -> None:
        """Set memory aside for the largest exchange that may have to be finished, per device."""
        if self._keep or self._has_released:
            return
        sizes: dict[torch.device, int] = {}
        first: dict[torch.device, int] = {}
        for item in self._exchanges:
            device = item.tensors[0].device
            if item.can_finish and device.type != "meta":
                sizes[device] = max(sizes.get(device, 0), item.num_bytes)
                first.setdefault(device, item.first_bytes)
        for device, size in sizes.items():
            if device.type == "cuda":
                fetch_memory(size + first[device], device)
        self._reserve = [
            torch.empty(size, dtype=torch.uint8, device=device) for device, size in sizes.items()
        ]

    def advance(self) -> None:
        """Do the next step."""
        done = self._num_done
        item, start, stop = self._steps[done]
        tensors = item.tensors[start:stop]
        if len(self._originals) == done and not self._has_released:
            self._originals.append(tuple([tensor.data for tensor in tensors]))
        if self._fresh is None or self._fresh[0] != done:
            self._fresh = done, item.make(start, stop)
        _assign(tensors, self._fresh[1])
        if item.can_finish and not self._keep:
            self._has_released = True
            self._originals.clear()
        self._num_done += 1
        self._fresh = None

    def settle(self) -> None:
        """After an interruption: roll back, or finish if an original is gone already."""
        if not self._has_released:
            for (item, start, stop), original in zip(self._steps, self._originals, strict=False):
                insist(partial(_assign, item.tensors[start:stop], original))
            return
        self._reserve.clear()
        self._divide()
        failures = 0
        while not self.is_done:
            try:
                self.advance()
            except BaseException as error:
                failures += 1
                if failures == _TRIES:
                    raise self._stuck() from error

    def _divide(self) -> None:
        """Go on in the smallest steps; what is made already may be half in place."""
        is_made = self._fresh is not None and self._fresh[0] == self._num_done
        first = self._num_done + is_made
        self._steps[first:] = [
            (item, start, stop)
            for item, begin, end in self._steps[first:]
            for start, stop in (
                pairwise(range(begin, end + 1)) if item.is_divisible else [(begin, end)]
            )
        ]

    def _stuck(self) -> PartialCastError:
        steps = self._steps[self._num_done :]
        left = [name for item, start, stop in steps for name in item.names[start:stop]]
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
