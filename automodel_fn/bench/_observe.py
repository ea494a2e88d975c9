"""Time and peak memory of one call, in this process."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar

import attrs
import torch

MIB = 2**20

_CLEAR_REFS, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")
_RESET_PEAK = "5"

Result = TypeVar("Result")


@attrs.frozen
class Observation:
    """What one call took.

    Args:
        ms: Wall-clock time in milliseconds, the device's work included.
        peak_mib: Peak memory of the device over what was in use before, in MiB; on a CPU the
            process's resident memory; None where the platform does not tell.
    """

    ms: float
    peak_mib: float | None = attrs.field(kw_only=True)


def observed(
    call: Callable[[], Result], device: str, *, pauses_gc: bool = False
) -> tuple[Result, Observation]:
    """Call once and see what it took.

    Garbage is collected before. The collector is on during the call, as in any program, unless it
    is paused: what it takes depends on all that the program holds.

    Args:
        call: What is measured.
        device: "cpu" or "cuda".
        pauses_gc: Whether to pause the collector during the call.
    """
    gc.collect()
    extra_peak = _cuda_meter() if device == "cuda" else _cpu_meter()
    with gc_paused() if pauses_gc else nullcontext():
        start = time.perf_counter()
        result = call()
        if device == "cuda":
            torch.cuda.synchronize()
        ms = (time.perf_counter() - start) * 1e3
    peak = extra_peak()
    return result, Observation(ms, peak_mib=None if peak is None else peak / MIB)


@contextmanager
def gc_paused() -> Generator[None]:
    """Without the collector, which is as it was afterwards."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _cuda_meter() -> Callable[[], int | None]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return lambda: torch.cuda.max_memory_allocated() - before


def _cpu_meter() -> Callable[[], int | None]:
    """The kernel's own high-water mark of resident memory: it misses no peak, unlike sampling."""
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
        before = _status_bytes("VmRSS")
    except (OSError, KeyError):
        return lambda: None
    return lambda: max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    lines = (line.partition(":") for line in _STATUS.read_text().splitlines())
    return int({key: value for key, _, value in lines}[field].split()[0]) * 1024
