"""Host time that the patch adds to a forward of Transformer Engine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from automodel_fn.bench._loops import Loop, interleaved_ns, median_difference, median_ratio
from automodel_fn.bench._spec import Measure
from automodel_fn.step._ambient import step_context

HOST_MEASURES = (
    Measure(
        "host_us",
        unit="us",
        description="host time of Transformer Engine's own forward which reuses the weight",
    ),
    Measure("added_host_us", unit="us", description="host time that the patch adds to it"),
    Measure("added_host_percent", unit="%", description="the same, as a share of it"),
    Measure(
        "host_noise_percent",
        unit="%",
        description="by how much that forward differs from itself, measured the same way",
    ),
    Measure(
        "plain_host_us",
        unit="us",
        description="host time of that forward as it is called without the patch, with no "
        "is_first_microbatch: it quantizes the weight in each call",
    ),
    Measure(
        "added_to_plain_percent",
        unit="%",
        description="what the patched forward, which reuses the weight, adds to that; below 0 "
        "it takes less",
    ),
    Measure(
        "off_added_host_us",
        unit="us",
        description="host time that the patch adds to it outside of every scope, where both "
        "quantize the weight",
    ),
    Measure("off_added_host_percent", unit="%", description="the same, as a share of it"),
)


def added_host(
    layer: nn.Module,
    inp: torch.Tensor,
    *,
    rounds: int = 1000,
    settle: Callable[[], object] = torch.cuda.synchronize,
) -> dict[str, float]:
    """Host time that the patch adds to a forward, as measures.

    Forwards of one module take turns call by call. Where the step is that of a later microbatch:
    the patched one, and the one below it, twice given False by its caller, of which the second
    shows what is noise, and once as it is called without the patch, so that it makes the quantized
    weight in each call. Outside of every scope: the patched one, and again the one below it with
    and without False. The device is waited for before each, outside of what is timed, so that no
    queue is full and no launch waits.

    Args:
        layer: A module of a patched class, which has run in a first microbatch.
        inp: Its input.
        rounds: How many turns.
        settle: Waits for the device.
    """
    patched: Any = type(layer).forward
    own = _calling(patched.__wrapped__, layer, inp, is_first_microbatch=False)
    loops = {
        "own": own,
        "plain": _calling(patched.__wrapped__, layer, inp),
        "patched": _calling(patched, layer, inp),
    }
    with torch.no_grad():
        with step_context(first_microbatch=False):
            later = _in_turns({**loops, "again": own}, rounds, settle)
        off = _in_turns(loops, rounds, settle)
    return {
        "host_us": statistics.median(later["own"]) / 1e3,
        "added_host_us": median_difference(later["patched"], later["own"]) / 1e3,
        "added_host_percent": _more(later["patched"], later["own"]),
        "host_noise_percent": abs(_more(later["again"], later["own"])),
        "plain_host_us": statistics.median(later["plain"]) / 1e3,
        "added_to_plain_percent": _more(later["patched"], later["plain"]),
        "off_added_host_us": median_difference(off["patched"], off["plain"]) / 1e3,
        "off_added_host_percent": _more(off["patched"], off["plain"]),
    }


def _in_turns(
    loops: Mapping[str, Loop], rounds: int, settle: Callable[[], object]
) -> dict[str, list[float]]:
    interleaved_ns(loops, calls=1, rounds=50, settle=settle)
    return interleaved_ns(loops, calls=1, rounds=rounds, settle=settle)


def _more(ours: list[float], base: list[float]) -> float:
    return 100 * (median_ratio(ours, base) - 1)


def _calling(
    forward: Callable[..., Any], layer: nn.Module, inp: torch.Tensor, **given: bool
) -> Loop:
    def call(calls: int) -> None:
        for _ in range(calls):
            forward(layer, inp, **given)

    return call
