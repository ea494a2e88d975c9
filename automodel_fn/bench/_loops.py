"""Host time of short calls, measured in turns: a machine that slows down slows all of them."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping

from automodel_fn.bench._observe import gc_paused

Loop = Callable[[int], object]
"""Does something as often as it is told."""


def interleaved_ns(
    loops: Mapping[str, Loop],
    *,
    calls: int,
    rounds: int,
    settle: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Nanoseconds a call of each loop, in each round; the collector is paused.

    Their order is drawn anew for each round, the same in each run: what ran just before decides
    what is in the processor's caches, and each loop follows each other one about as often.

    Args:
        loops: What is measured, by name; each is run once before.
        calls: How often a loop does its thing in one round.
        rounds: How many rounds.
        settle: Called before each loop, outside of what is timed.
    """
    found: dict[str, list[float]] = {name: [] for name in loops}
    for loop in loops.values():
        loop(calls)
    order, orders = list(loops.items()), random.Random(0)
    gc.collect()
    with gc_paused():
        for _ in range(rounds):
            orders.shuffle(order)
            for name, loop in order:
                settle()
                start = time.perf_counter_ns()
                loop(calls)
                found[name].append((time.perf_counter_ns() - start) / calls)
    return found


def median_difference(ours: list[float], base: list[float]) -> float:
    """The median over the rounds of one minus the other.

    Example:
        >>> median_difference([3.0, 9.0, 4.0], [1.0, 2.0, 1.0])
        3.0
    """
    return statistics.median(one - other for one, other in zip(ours, base, strict=True))


def median_ratio(ours: list[float], base: list[float]) -> float:
    """The median over the rounds of one divided by the other.

    Example:
        >>> median_ratio([3.0, 8.0, 4.0], [1.0, 2.0, 1.0])
        4.0
    """
    return statistics.median(one / other for one, other in zip(ours, base, strict=True))
