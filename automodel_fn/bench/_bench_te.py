"""The benchmark "te": gradient accumulation with Transformer Engine's cached weights, on a GPU."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from automodel_fn.backend._fp8 import TEFp8Config
from automodel_fn.bench._spec import (
    FULL,
    QUICK,
    Benchmark,
    Case,
    Measure,
    Measured,
    Promise,
    Subject,
)
from automodel_fn.bench._te_host import HOST_MEASURES, added_host
from automodel_fn.step._ambient import step_context
from automodel_fn.step._context import StepContext
from automodel_fn.te._cache import cache_counts
from automodel_fn.te._load import load_te_classes
from automodel_fn.te._patch import patch_te

_RECIPES = ("current", "block", "delayed")
_MICROBATCHES = 8
_STEPS = tuple(
    StepContext(index == 0, optim_step=index == _MICROBATCHES - 1) for index in range(_MICROBATCHES)
)
_HOST = tuple(measure.name for measure in HOST_MEASURES)
_PLAIN, _BF16 = "te.Linear, not cached", "nn.Linear, bf16"
Forward = Callable[..., Any]


def _case(recipe: str, tokens: int, in_features: int, out_features: int, group: str) -> Case:
    prefix = "quick-" if group == QUICK else ""
    return Case(
        f"{prefix}{recipe}",
        device="cuda",
        description=f"{_MICROBATCHES} microbatches of {tokens:,} tokens, forward and backward of "
        f"{in_features:,} -> {out_features:,}, recipe {recipe}",
        parameters={
            "recipe": _RECIPES.index(recipe),
            "tokens": tokens,
            "in_features": in_features,
            "out_features": out_features,
            "rounds": 5 if group == QUICK else 25,
        },
        needed_bytes=64 * (tokens + in_features) * (in_features + out_features),
        group=group,
    )


def _recipe(case: Case) -> Any:
    name = _RECIPES[case.parameter("recipe")]
    if name != "delayed":
        return TEFp8Config(name).build_recipe()
    from transformer_engine.common import recipe  # pyright: ignore[reportMissingImports] - optional

    return recipe.DelayedScaling()


def _layer(case: Case, *, is_te: bool) -> nn.Module:
    torch.manual_seed(0)
    sizes = case.parameter("in_features"), case.parameter("out_features")
    if not is_te:
        return nn.Linear(*sizes, bias=False, device="cuda", dtype=torch.bfloat16)
    made: Any = load_te_classes().linear
    return made(*sizes, bias=False, params_dtype=torch.bfloat16, device="cuda")


def _by_step(layer: nn.Module, inp: torch.Tensor, step: StepContext) -> torch.Tensor:
    with step_context(step):
        return layer(inp)


def _by_hand(layer: nn.Module, inp: torch.Tensor, step: StepContext) -> torch.Tensor:
    return layer(inp, is_first_microbatch=step.first_microbatch)


def _plain(layer: nn.Module, inp: torch.Tensor, step: StepContext) -> torch.Tensor:
    return layer(inp)


def _measured(forward: Forward, is_te: bool, is_patched: bool, case: Case) -> Measured:
    layer = _layer(case, is_te=is_te)
    shape = case.parameter("tokens"), case.parameter("in_features")
    inp = torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    grad = torch.randn(
        shape[0], case.parameter("out_features"), device="cuda", dtype=torch.bfloat16
    )
    config = TEFp8Config(_recipe(case)) if is_te else None
    handle = patch_te() if is_patched else None
    try:
        times = [
            _accumulation_ms(layer, inp, grad, forward, config)
            for _ in range(case.parameter("rounds") + 3)
        ][3:]
        with contextlib.nullcontext() if config is None else config.autocast():
            added: Mapping[str, float | None] = (
                added_host(layer, inp) if is_patched else dict.fromkeys(_HOST)
            )
    finally:
        if handle is not None:
            handle.remove()
    counts = cache_counts(layer)
    is_kept = counts.reused > 0 and counts.refreshed == 0
    return Measured(
        {"accumulate_ms": statistics.median(times), **added},
        facts={"is_weight_kept": int(is_kept) if is_patched else None},
    )


def _accumulation_ms(
    layer: nn.Module, inp: torch.Tensor, grad: torch.Tensor, forward: Forward, config: Any
) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    layer.zero_grad()
    inp.grad = None
    torch.cuda.synchronize()
    start.record()
    for step in _STEPS:
        if config is None:
            out = forward(layer, inp, step)
        else:
            with config.autocast():
                out = forward(layer, inp, step)
        out.backward(grad)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


BENCHMARK = Benchmark(
    "te",
    description="Accumulate gradients of one FP8 linear layer over 8 microbatches, weights cached.",
    measures=(
        Measure(
            "accumulate_ms",
            unit="ms",
            description="device time of the 8 forwards and backwards, median of 25 after 3",
            is_drawn=True,
        ),
        *HOST_MEASURES,
    ),
    cases=(
        *(_case(recipe, 4096, 4096, 14336, FULL) for recipe in _RECIPES),
        *(_case(recipe, 512, 512, 1024, QUICK) for recipe in _RECIPES),
    ),
    subjects=(
        Subject(
            "automodel_fn",
            description="te.Linear under patch_te, in a step_context",
            measure=partial(_measured, _by_step, True, True),
            load=load_te_classes,
            package="transformer-engine",
            claims=("is_weight_kept",),
            promises=(
                Promise("accumulate_ms", at_most=1, peer=_PLAIN, cases=_RECIPES),
                Promise("accumulate_ms", at_most=1 / 1.4, peer=_BF16, cases=("current",)),
                Promise("added_to_plain_percent", at_most=0, cases=_RECIPES),
            ),
        ),
        Subject(
            _PLAIN,
            description="te.Linear as it is: the weight is quantized in every microbatch",
            measure=partial(_measured, _plain, True, False),
            load=load_te_classes,
            package="transformer-engine",
        ),
        Subject(
            "te.Linear, cached by hand",
            description="te.Linear, given is_first_microbatch by its caller",
            measure=partial(_measured, _by_hand, True, False),
            load=load_te_classes,
            package="transformer-engine",
        ),
        Subject(
            _BF16,
            description="torch.nn.Linear in bf16, whatever the recipe",
            measure=partial(_measured, _plain, False, False),
        ),
    ),
    ours="automodel_fn",
    conditions=(
        "each measurement in a fresh process, one after another, every subject once a round",
        "the weight does not change between the accumulations; each begins with a first microbatch",
        "no gradient is fused; the input needs a gradient, too",
        "host time without gradients: 1000 turns of single calls, their order drawn anew for each, "
        "each on an idle device; medians of the differences or ratios of a turn; the collector is "
        "paused",
    ),
)
