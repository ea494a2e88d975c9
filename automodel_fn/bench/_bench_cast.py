"""The benchmark "cast": float32 to bf16, ours beside what people use today."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import attrs
import torch
from torch import nn

from automodel_fn.bench._cast_models import built_model, outcome_of
from automodel_fn.bench._observe import MIB, observed
from automodel_fn.bench._spec import QUICK, Benchmark, Case, Measure, Measured, Subject
from automodel_fn.cast._apply import apply_cast_plan
from automodel_fn.cast._planners import cast_plan

Prepare = Callable[[nn.Module], Callable[[], object]]

# A peer that casts everything and restores copies of the pins holds up to 1.5 times the model.
_NEEDED_FACTOR = 1.75
_NEEDED_BESIDE = 512 * MIB


def _case(
    name: str, device: str, num_tensors: int, rows: int, cols: int, group: str = "full"
) -> tuple[Case, Case]:
    size = num_tensors * rows * cols * 4

    def made(suffix: str, half_pinned: int, words: str) -> Case:
        return Case(
            name + suffix,
            device=device,
            description=f"{size / MIB:,.0f} MiB of float32 in {num_tensors:,} tensors of "
            f"{rows:,} x {cols:,}, {words}",
            parameters={
                "num_tensors": num_tensors,
                "rows": rows,
                "cols": cols,
                "half_pinned": half_pinned,
            },
            needed_bytes=int(_NEEDED_FACTOR * size) + _NEEDED_BESIDE,
            group=group,
        )

    return made("", 0, "no fp32 pins"), made("-half-pinned", 1, "half of the bytes are fp32 pins")


def _measured(prepare: Prepare, has_plan: bool, case: Case) -> Measured:
    """Warm up on one layer of the same weights, then plan and apply on the model, and check it."""
    one_layer = attrs.evolve(case, parameters={**dict(case.parameters), "num_tensors": 8})
    warm = built_model(one_layer)
    prepare(warm)()
    del warm
    if case.device == "cuda":
        torch.cuda.empty_cache()
    model = built_model(case)
    call, planning = observed(lambda: prepare(model), case.device, pauses_gc=True)
    _, applying = observed(call, case.device)
    outcome = outcome_of(model, case)
    pins_exact = outcome.are_pins_exact
    return Measured(
        {
            "plan_ms": planning.ms if has_plan else None,
            "apply_ms": applying.ms,
            "total_ms": applying.ms + (planning.ms if has_plan else 0.0),
            "extra_peak_mib": applying.peak_mib,
        },
        facts={
            "cast_exact": int(outcome.is_cast_exact),
            "pins_exact": None if pins_exact is None else int(pins_exact),
            "num_pins": outcome.num_pins,
        },
    )


def _ours(model: nn.Module) -> Callable[[], object]:
    return partial(apply_cast_plan, cast_plan(model, torch.bfloat16))


def _model_to(model: nn.Module) -> Callable[[], object]:
    return partial(model.to, torch.bfloat16)


def _nemo_cast() -> Callable[..., object]:
    from nemo_automodel.components.models.common.utils import (  # pyright: ignore[reportMissingImports] - a peer
        cast_model_to_dtype,
    )

    return cast_model_to_dtype


def _nemo(model: nn.Module) -> Callable[[], object]:
    return partial(_nemo_cast(), model, torch.bfloat16)


BENCHMARK = Benchmark(
    "cast",
    description="Cast a float32 model to bf16 in place, except for its fp32 pins.",
    measures=(
        Measure("plan_ms", unit="ms", description="making the plan; peers have none"),
        Measure("apply_ms", unit="ms", description="casting, the plan made before", is_drawn=True),
        Measure("total_ms", unit="ms", description="plan and cast together"),
        Measure(
            "extra_peak_mib",
            unit="MiB",
            description="peak memory during the cast, over the loaded model",
        ),
    ),
    cases=(
        *_case("few", "cpu", num_tensors=8, rows=4096, cols=8192),
        *_case("many", "cpu", num_tensors=32768, rows=64, cols=128),
        *_case("names-1k", "cpu", num_tensors=1000, rows=2, cols=2, group="names"),
        *_case("names-100k", "cpu", num_tensors=100_000, rows=2, cols=2, group="names"),
        *_case("quick-few", "cpu", num_tensors=8, rows=512, cols=1024, group=QUICK),
        *_case("quick-many", "cpu", num_tensors=512, rows=64, cols=128, group=QUICK),
        *_case("few", "cuda", num_tensors=360, rows=4096, cols=4096),
        *_case("many", "cuda", num_tensors=40000, rows=64, cols=64),
        *_case("quick-few", "cuda", num_tensors=8, rows=512, cols=1024, group=QUICK),
        *_case("quick-many", "cuda", num_tensors=512, rows=64, cols=128, group=QUICK),
    ),
    subjects=(
        Subject(
            "automodel_fn",
            description="apply(cast_plan(model, bf16)): fp32 pins are not touched",
            measure=partial(_measured, _ours, True),
            claims=("cast_exact", "pins_exact"),
        ),
        Subject(
            "model.to",
            description="model.to(torch.bfloat16): loses the fp32 pins",
            measure=partial(_measured, _model_to, False),
            claims=("cast_exact",),
        ),
        Subject(
            "nemo_automodel cast_model_to_dtype",
            description="cast_model_to_dtype(model, torch.bfloat16): casts all, then restores pins",
            measure=partial(_measured, _nemo, False),
            load=_nemo_cast,
            package="nemo-automodel",
            claims=("cast_exact", "pins_exact"),
        ),
    ),
    ours="automodel_fn",
    conditions=(
        "each measurement in a fresh process, one after another, every subject once a round",
        "warm-up: the same call on one layer of the case's weights, before the model is built",
        "garbage: collected before each timed call; during it the collector is on, as by default, "
        "but paused while planning",
        "peak memory: the kernel's high-water mark of resident memory on a CPU, reset before the "
        "call; torch.cuda.max_memory_allocated on a GPU",
        "after the cast every weight is made again from its seed and compared bit for bit",
    ),
)
