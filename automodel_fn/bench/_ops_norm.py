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
    random_tensor,
)
from automodel_fn.bench._spec import FULL, QUICK, Case
from automodel_fn.ops._rms_norm import rms_norm_fp32, rms_norm_reference

_EPS = 1e-5


def _case(
    rows: int,
    hidden: int,
    device: str = "cuda",
    *,
    is_bf16: bool = True,
    is_added: bool = False,
    group: str = FULL,
) -> Case:
    size = rows * hidden * (2 if is_bf16 else 4)
    dtype = "bf16" if is_bf16 else "fp32"
    num_forward, num_backward = (4, 4) if is_added else (2, 3)
    words = (
        "x and the residual are read, y and the sum written; sum, dy and dsum are read, dx written"
        if is_added
        else "x is read, y written; x and dy are read, dx written"
    )
    name = f"norm-{'residual-' * is_added}{rows}x{hidden}{f'-{dtype}' * (device == 'cpu')}"
    return Case(
        "quick-" * (group == QUICK) + name,
        device=device,
        description=f"{dtype} [{rows:,}, {hidden:,}] and a weight: {words}, "
        f"{num_forward * size / 1e6:,.1f} and {num_backward * size / 1e6:,.1f} MB",
        parameters={
            "rows": rows,
            "hidden": hidden,
            "is_bf16": int(is_bf16),
            "forward_bytes": num_forward * size,
            "forward_backward_bytes": (num_forward + num_backward) * size,
        },
        needed_bytes=2**30 + 100 * size,
        group=group,
        batch="norm",
    )


def _tensors(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    rows, hidden = case.parameter("rows"), case.parameter("hidden")
    x = random_tensor(case, generator, rows, hidden).requires_grad_()
    # A parameter, so that a module can hold it.
    return x, nn.Parameter(1 + random_tensor(case, generator, hidden) / 8)


def _inputs(case: Case, generator: torch.Generator) -> Inputs:
    x, weight = _tensors(case, generator)
    return Inputs((x, weight), grads=(random_tensor(case, generator, *x.shape),))


def _added_inputs(case: Case, generator: torch.Generator) -> Inputs:
    x, weight = _tensors(case, generator)
    residual, *grads = (random_tensor(case, generator, *x.shape) for _ in range(3))
    return Inputs((x, weight, residual.requires_grad_()), grads=tuple(grads))


def _ours(x: Tensor, weight: Tensor) -> Call:
    return partial(rms_norm_fp32, x, weight, _EPS)


def _ours_added(x: Tensor, weight: Tensor, residual: Tensor) -> Call:
    return partial(rms_norm_fp32, x, weight, _EPS, residual=residual)


def _torch(x: Tensor, weight: Tensor) -> Call:
    return partial(_holding(nn.RMSNorm(x.shape[-1], eps=_EPS, device="meta"), weight), x)


def _torch_added(x: Tensor, weight: Tensor, residual: Tensor) -> Call:
    norm = _holding(nn.RMSNorm(x.shape[-1], eps=_EPS, device="meta"), weight)
    return partial(_add_and_norm, norm, x, residual)


def _te_norm(x: Tensor, weight: Tensor) -> nn.Module:
    from transformer_engine.pytorch import (  # pyright: ignore[reportMissingImports] - a peer
        RMSNorm,
    )

    made: Any = RMSNorm(x.shape[-1], eps=_EPS, device="cuda", dtype=x.dtype)
    return _holding(made, weight)


def _te(x: Tensor, weight: Tensor) -> Call:
    return partial(_te_norm(x, weight), x)


def _te_added(x: Tensor, weight: Tensor, residual: Tensor) -> Call:
    return partial(_add_and_norm, _te_norm(x, weight), x, residual)


def _liger(x: Tensor, weight: Tensor) -> Call:
    from liger_kernel.transformers.rms_norm import (  # pyright: ignore[reportMissingImports] - a peer
        LigerRMSNorm,
    )

    return partial(_holding(LigerRMSNorm(x.shape[-1], eps=_EPS), weight), x)


def _liger_added(x: Tensor, weight: Tensor, residual: Tensor) -> Call:
    from liger_kernel.transformers.fused_add_rms_norm import (  # pyright: ignore[reportMissingImports] - a peer
        LigerFusedAddRMSNorm,
    )

    return partial(_holding(LigerFusedAddRMSNorm(x.shape[-1], eps=_EPS), weight), x, residual)


def _quack(x: Tensor, weight: Tensor) -> Call:
    from quack import rmsnorm  # pyright: ignore[reportMissingImports] - a peer

    return partial(rmsnorm, x, weight, eps=_EPS)


def _quack_added(x: Tensor, weight: Tensor, residual: Tensor) -> Call:
    from quack import rmsnorm  # pyright: ignore[reportMissingImports] - a peer

    return partial(rmsnorm, x, weight, residual=residual, eps=_EPS, prenorm=True)


def _holding(module: nn.Module, weight: Tensor) -> nn.Module:
    module.weight = weight
    return module


def _add_and_norm(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return norm(total), total


def _exact(x: Tensor, weight: Tensor) -> Tensor:
    return rms_norm_reference(x, weight, _EPS)


def _exact_added(x: Tensor, weight: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm_reference(total, weight, _EPS), total


NORM = Op(
    (
        _case(8192, 4096),
        _case(16384, 7168),
        _case(65536, 128),
        _case(1024, 1024, group=QUICK),
    ),
    inputs=_inputs,
    exact=by_autograd(_exact),
    ways={OURS: _ours, TORCH: _torch, TE: _te, LIGER: _liger, QUACK: _quack},
    ceiling=copies,
)
ADDED_NORM = Op(
    (
        _case(8192, 4096, is_added=True),
        _case(16384, 7168, is_added=True),
        _case(1024, 1024, is_added=True, group=QUICK),
    ),
    inputs=_added_inputs,
    exact=by_autograd(_exact_added),
    ways={
        OURS: _ours_added,
        TORCH: _torch_added,
        TE: _te_added,
        LIGER: _liger_added,
        QUACK: _quack_added,
    },
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
