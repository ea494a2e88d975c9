"""The norm in the benchmark "ops": RMSNorm computed in float32, with and without a residual."""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from automodel_fn.bench._device_time import Call
from automodel_fn.bench._ops_spec import (
    LIGER,
    OURS,
    QUACK,
    TE,
    TORCH,
    Inputs,
    Op,
    by_autograd,
    copies,
)
from automodel_fn.bench._spec import FULL, QUICK, Case
from automodel_fn.ops._rms_norm import rms_norm_fp32, rms_norm_reference

_EPS = 1e-5


def _case(
    rows: int, hidden: int, device: str = "cuda", *, is_bf16: bool = True, group: str = FULL
) -> Case:
    size = rows * hidden * (2 if is_bf16 else 4)
    dtype = "bf16" if is_bf16 else "fp32"
    return Case(
        f"{'quick-' * (group == QUICK)}norm-{rows}x{hidden}" + f"-{dtype}" * (device == "cpu"),
        device=device,
        description=f"{dtype} [{rows:,}, {hidden:,}] and a weight; forward: x is read, y written "
        f"({2 * size / 1e6:,.1f} MB); backward: x and dy are read, dx written "
        f"({3 * size / 1e6:,.1f} MB more)",
        parameters={
            "rows": rows,
            "hidden": hidden,
            "is_bf16": int(is_bf16),
            "forward_bytes": 2 * size,
            "forward_backward_bytes": 5 * size,
        },
        needed_bytes=2**30 + 100 * size,
        group=group,
        batch="norm",
    )


def _inputs(case: Case, generator: torch.Generator) -> Inputs:
    shape = case.parameter("rows"), case.parameter("hidden")
    options: dict[str, Any] = {
        "generator": generator,
        "device": case.device,
        "dtype": torch.bfloat16 if case.parameter("is_bf16") else torch.float32,
    }
    x = torch.randn(shape, **options).requires_grad_()
    # A parameter, so that a module can hold it.
    weight = nn.Parameter(1 + torch.randn(shape[1], **options) / 8)
    return Inputs((x, weight), grads=(torch.randn(shape, **options),))


def _ours(x: Tensor, weight: Tensor) -> Call:
    return partial(rms_norm_fp32, x, weight, _EPS)


def _of_module(module: nn.Module, x: Tensor, weight: Tensor) -> Call:
    module.weight = weight
    return partial(module, x)


def _torch(x: Tensor, weight: Tensor) -> Call:
    made = nn.RMSNorm(x.shape[-1], eps=_EPS, device="meta")
    return _of_module(made, x, weight)


def _te(x: Tensor, weight: Tensor) -> Call:
    from transformer_engine.pytorch import (  # pyright: ignore[reportMissingImports] - a peer
        RMSNorm,
    )

    made: Any = RMSNorm(x.shape[-1], eps=_EPS, device="cuda", dtype=x.dtype)
    return _of_module(made, x, weight)


def _liger(x: Tensor, weight: Tensor) -> Call:
    from liger_kernel.transformers.rms_norm import (  # pyright: ignore[reportMissingImports] - a peer
        LigerRMSNorm,
    )

    return _of_module(LigerRMSNorm(x.shape[-1], eps=_EPS), x, weight)


def _quack(x: Tensor, weight: Tensor) -> Call:
    from quack import rmsnorm  # pyright: ignore[reportMissingImports] - a peer

    return partial(rmsnorm, x, weight, eps=_EPS)


_FORMULA = by_autograd(lambda x, weight: rms_norm_reference(x, weight, _EPS))

NORM = Op(
    (
        _case(8192, 4096),
        _case(16384, 7168),
        _case(65536, 128),
        _case(1024, 1024, group=QUICK),
    ),
    inputs=_inputs,
    exact=_FORMULA,
    ways={OURS: _ours, TORCH: _torch, TE: _te, LIGER: _liger, QUACK: _quack},
    ceiling=copies,
)
NORM_ON_CPU = attrs.evolve(
    NORM,
    cases=(
        _case(2048, 2048, "cpu"),
        _case(2048, 2048, "cpu", is_bf16=False),
        _case(64, 128, "cpu", group=QUICK),
        _case(64, 128, "cpu", is_bf16=False, group=QUICK),
    ),
    ways={OURS: _ours, TORCH: _torch},
)
