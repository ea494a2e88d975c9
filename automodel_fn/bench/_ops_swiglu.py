"""SwiGLU in the benchmark "ops": silu(gate) * up."""

from __future__ import annotations

from functools import partial

import attrs
import torch
from torch import Tensor
from torch.nn import functional

from automodel_fn.bench._device_time import Call
from automodel_fn.bench._ops_spec import (
    LIGER,
    OURS,
    TORCH,
    Inputs,
    Op,
    by_autograd,
    copies,
    random_tensor,
)
from automodel_fn.bench._spec import FULL, QUICK, Case
from automodel_fn.ops._swiglu import swiglu, swiglu_reference


def _case(
    rows: int, intermediate: int, device: str = "cuda", *, is_bf16: bool = True, group: str = FULL
) -> Case:
    size = rows * intermediate * (2 if is_bf16 else 4)
    dtype = "bf16" if is_bf16 else "fp32"
    return Case(
        f"{'quick-' * (group == QUICK)}swiglu-{rows}x{intermediate}"
        + f"-{dtype}" * (device == "cpu"),
        device=device,
        description=f"{dtype} gate and up [{rows:,}, {intermediate:,}]: both are read, y written; "
        f"both and dy are read, dgate and dup written, {3 * size / 1e6:,.1f} and "
        f"{5 * size / 1e6:,.1f} MB",
        parameters={
            "rows": rows,
            "intermediate": intermediate,
            "is_bf16": int(is_bf16),
            "forward_bytes": 3 * size,
            "forward_backward_bytes": 8 * size,
        },
        needed_bytes=2**30 + 100 * size,
        group=group,
        batch="swiglu",
    )


def _inputs(case: Case, generator: torch.Generator) -> Inputs:
    shape = case.parameter("rows"), case.parameter("intermediate")
    gate, up, grad = (random_tensor(case, generator, *shape) for _ in range(3))
    return Inputs((gate.requires_grad_(), up.requires_grad_()), grads=(grad,))


def _ours(gate: Tensor, up: Tensor) -> Call:
    return partial(swiglu, gate, up)


def _torch(gate: Tensor, up: Tensor) -> Call:
    return lambda: functional.silu(gate) * up


def _liger(gate: Tensor, up: Tensor) -> Call:
    from liger_kernel.transformers.functional import (  # pyright: ignore[reportMissingImports] - a peer
        liger_swiglu,
    )

    return partial(liger_swiglu, gate, up)


SWIGLU = Op(
    (_case(8192, 14336), _case(65536, 1408), _case(1024, 1024, group=QUICK)),
    inputs=_inputs,
    exact=by_autograd(swiglu_reference),
    ways={OURS: _ours, TORCH: _torch, LIGER: _liger},
    ceiling=copies,
)
SWIGLU_ON_CPU = attrs.evolve(
    SWIGLU,
    cases=(
        _case(1024, 4096, "cpu"),
        _case(1024, 4096, "cpu", is_bf16=False),
        _case(64, 128, "cpu", group=QUICK),
        _case(64, 128, "cpu", is_bf16=False, group=QUICK),
    ),
    ways={OURS: _ours, TORCH: _torch},
)
