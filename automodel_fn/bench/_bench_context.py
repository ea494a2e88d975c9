"""The benchmark "context": what a step context costs on the host, beside a bare one and a flag."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from automodel_fn.bench._context_subjects import (
    Carrier,
    Idle,
    nemo,
    nemo_utils,
    ours,
    raw,
    raw_enters,
)
from automodel_fn.bench._loops import Loop, interleaved_ns, median_difference, median_ratio
from automodel_fn.bench._spec import FULL, QUICK, Benchmark, Case, Measure, Measured, Subject

MOST_RAW = 15
"""How many times a raw set and reset entering and leaving may take."""


def _case(name: str, is_by_field: int, words: str, group: str = FULL) -> Case:
    calls, rounds = (2_000, 11) if group == QUICK else (20_000, 51)
    return Case(
        name,
        device="cpu",
        description=f"{words}; {calls:,} calls a loop, {rounds} interleaved rounds",
        parameters={"is_by_field": is_by_field, "calls": calls, "rounds": rounds},
        needed_bytes=0,
        group=group,
    )


def _measured(make: Callable[[bool], Carrier], case: Case) -> Measured:
    carrier = make(bool(case.parameter("is_by_field")))
    idle, inp = Idle(), torch.ones(2, 2)
    loops: dict[str, Loop] = {
        "empty": _empty,
        "raw": raw_enters,
        "enter": carrier.enters,
        "plain": _calling(Idle.forward, idle, inp),
    }
    reading = {"read": carrier.reads}
    if carrier.forward is not None:
        reading["forward"] = _calling(carrier.forward, idle, inp)
    calls, rounds = case.parameter("calls"), case.parameter("rounds")
    outside = interleaved_ns(loops | reading, calls=calls, rounds=rounds)
    with carrier.within():
        inside = interleaved_ns(
            {"empty": _empty, "plain": loops["plain"]} | reading, calls=calls, rounds=rounds
        )
    per_raw = median_ratio(outside["enter"], outside["raw"])
    return Measured(
        {
            "enter_ns": median_difference(outside["enter"], outside["empty"]),
            "enter_per_raw": per_raw,
            "read_ns": median_difference(inside["read"], inside["empty"]),
            "forward_ns": _added(inside),
            "forward_off_ns": _added(outside),
        },
        facts={"is_within_raw": int(per_raw <= MOST_RAW)},
    )


def _added(found: dict[str, list[float]]) -> float | None:
    return median_difference(found["forward"], found["plain"]) if "forward" in found else None


def _empty(calls: int) -> None:
    for _ in range(calls):
        pass


def _calling(forward: Callable[..., Any], module: Idle, inp: torch.Tensor) -> Loop:
    def call(calls: int) -> None:
        for _ in range(calls):
            forward(module, inp)

    return call


BENCHMARK = Benchmark(
    "context",
    description="Put a step in force, leave it again, and read it in a forward, on the host.",
    measures=(
        Measure(
            "enter_ns",
            unit="ns",
            description="entering and leaving; an empty loop taken off",
            is_drawn=True,
        ),
        Measure(
            "enter_per_raw", unit="x", description="the same, by a raw set and reset beside it"
        ),
        Measure("read_ns", unit="ns", description="reading the step inside a scope"),
        Measure(
            "forward_ns",
            unit="ns",
            description="what reading adds to a forward that does nothing, inside a scope",
        ),
        Measure("forward_off_ns", unit="ns", description="the same outside of every scope"),
    ),
    cases=(
        _case("step", 0, "with step_context(step), as accumulate gives it"),
        _case("field", 1, "with step_context(first_microbatch=False)"),
        _case("quick-step", 0, "with step_context(step)", QUICK),
    ),
    subjects=(
        Subject(
            "automodel_fn",
            description="step_context, current_step, and the patched forward without a cache",
            measure=partial(_measured, ours),
            claims=("is_within_raw",),
        ),
        Subject(
            "raw ContextVar",
            description="set and reset: not seen by backwards on other threads, nor compiled code",
            measure=partial(_measured, raw),
        ),
        Subject(
            "nemo_automodel global flag",
            description="set_is_first_microbatch twice, and the forward that its patch makes",
            measure=partial(_measured, nemo),
            load=nemo_utils,
            package="nemo-automodel",
        ),
    ),
    ours="automodel_fn",
    conditions=(
        "each measurement in a fresh process, one after another, every subject once a round",
        "in a process all loops take turns, each once before they are measured; medians of the "
        "differences or ratios of a turn; the garbage collector is paused",
        "the forward is that of a module which gives its input back, with the signature of "
        "Transformer Engine's Linear; the peer's wrapper is made by its own patch of that module",
        "no autograd node is made between entering and leaving",
    ),
)
