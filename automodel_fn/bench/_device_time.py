"""Times of short calls by turns: the device's by CUDA graphs, the host's by its clock.

In every turn each of those compared runs once, so that a machine which slows down slows all; which
of them is the first changes from turn to turn.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import attrs
import torch

from automodel_fn.bench._observe import gc_paused

Call = Callable[[], Any]
"""One call; each of several has buffers of its own."""

_BYTES_A_RUN = 2e9
_MOST_CALLS = 512
_SECONDS, _FEWEST, _MOST = 1.0, 5, 50


@attrs.frozen(eq=False)
class Run:
    """Many calls that the device is given at once.

    Args:
        start: Gives them to the device.
        num_calls: How many.
        is_graph: Whether it replays a CUDA graph; otherwise Python makes the calls each time, since
            they wait for the device, which no graph can hold.
    """

    start: Callable[[], object]
    num_calls: int = attrs.field(kw_only=True)
    is_graph: bool = attrs.field(kw_only=True)


def calls_a_run(num_bytes: int, num_sets: int) -> int:
    """How many calls a run needs to last about a millisecond on a GPU: whole turns of the sets.

    Args:
        num_bytes: What one call reads and writes.
        num_sets: How many sets of buffers it takes in turn.

    Example:
        >>> calls_a_run(500_000_000, 3), calls_a_run(8_000_000_000, 1)
        (6, 1)
    """
    asked = min(-(-_BYTES_A_RUN // num_bytes), _MOST_CALLS)
    return int(-(-asked // num_sets)) * num_sets


def cuda_run(calls: Sequence[Call], num_calls: int) -> Run:
    """The calls in turn as one CUDA graph, after each was made once on another stream.

    What the last round of calls returned is kept while the graph is made: so outputs, too, are
    written to different memory.

    Args:
        calls: The same call on different buffers.
        num_calls: How many calls the graph holds.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
        waits = _waits_for_the_device(calls[0])
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    if waits:
        return Run(partial(_run, calls, num_calls), num_calls=num_calls, is_graph=False)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        _run(calls, num_calls)
    return Run(graph.replay, num_calls=num_calls, is_graph=True)


def _run(calls: Sequence[Call], num_calls: int) -> None:
    kept: deque[object] = deque(maxlen=len(calls))
    for index in range(num_calls):
        kept.append(calls[index % len(calls)]())


def _waits_for_the_device(call: Call) -> bool:
    # Asked before a graph is made of it: a capture that fails leaves torch 2.11's allocator in a
    # state in which nothing more can be measured (pytorch/pytorch #180395).
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype, torch says
        torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def device_us(runs: Mapping[str, Run]) -> dict[str, float]:
    """Median time of a call on the device, in us.

    Each run is started twice and timed the second time: the first keeps the device busy until the
    host has sent the second.
    """
    found: dict[str, list[float]] = {name: [] for name in runs}
    with gc_paused():
        for turn in _turns():
            events = {name: _timed(runs[name]) for name in _turned(runs, turn)}
            torch.cuda.synchronize()
            for name, (start, end) in events.items():
                found[name].append(start.elapsed_time(end) * 1e3 / runs[name].num_calls)
    return _medians(found)


def _timed(run: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    run.start()
    start.record()
    run.start()
    end.record()
    return start, end


def host_us(calls: Mapping[str, Sequence[Call]], device: str) -> dict[str, float]:
    """Median time until a call returns to the host, in us; on a CPU that is all of it.

    Args:
        calls: The same call on different buffers, which take turns.
        device: "cpu" or "cuda"; a GPU is idle when a call begins.
    """
    found: dict[str, list[float]] = {name: [] for name in calls}
    with gc_paused():
        for turn in _turns():
            for name in _turned(calls, turn):
                call = calls[name][turn % len(calls[name])]
                if device == "cuda":
                    torch.cuda.synchronize()
                start = time.perf_counter_ns()
                kept = call()
                found[name].append((time.perf_counter_ns() - start) / 1e3)
                del kept
    return _medians(found)


def _turned(names: Iterable[str], turn: int) -> list[str]:
    """The names in their order, begun elsewhere in each turn."""
    order = list(names)
    first = turn % len(order)
    return order[first:] + order[:first]


def _turns() -> Iterator[int]:
    """As many as fit into a second, but at least 5, and at most 50."""
    start = time.perf_counter()
    for turn in range(_MOST):
        if turn >= _FEWEST and time.perf_counter() - start > _SECONDS:
            return
        yield turn


def _medians(found: Mapping[str, Sequence[float]]) -> dict[str, float]:
    return {name: statistics.median(times) for name, times in found.items()}
