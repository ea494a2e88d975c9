"""The logits of a head in the benchmark "ops": bf16 hidden states, a float32 weight.

Shapes: T tokens, H hidden, V the vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from automodel_fn.bench._device_time import Call
from automodel_fn.bench._ops_products import head_products
from automodel_fn.bench._ops_spec import (
    OURS,
    OURS_BF16,
    OURS_SPLIT,
    TORCH,
    TORCH_BF16,
    TORCH_TF32,
    Inputs,
    Op,
    by_autograd,
    random_tensor,
)
from automodel_fn.bench._spec import FULL, QUICK, Case
from automodel_fn.ops._logits import lm_head_logits
from automodel_fn.ops._weight_parts import weight_parts


def _case(tokens: int, hidden: int, vocabulary: int, group: str = FULL) -> Case:
    operands, logits = tokens * hidden * 2 + vocabulary * hidden * 4, tokens * vocabulary * 4
    return Case(
        f"{'quick-' * (group == QUICK)}head-{tokens}",
        device="cuda",
        description=f"bf16 hidden states [{tokens:,}, {hidden:,}], fp32 weight [{vocabulary:,}, "
        f"{hidden:,}], fp32 logits; the ceiling is the products alone in bf16, one forward, two "
        "backward",
        parameters={
            "tokens": tokens,
            "hidden": hidden,
            "vocabulary": vocabulary,
            "is_bf16": 1,
            "forward_bytes": operands + logits,
            "forward_backward_bytes": 3 * (operands + logits),
        },
        # Parts of the weight, and of each of seven subjects the logits and the gradients.
        needed_bytes=2**30 + 10 * (operands + logits) + 6 * operands,
        group=group,
        batch="head",
    )


def _inputs(case: Case, generator: torch.Generator) -> Inputs:
    tokens, hidden, size = (case.parameter(name) for name in ("tokens", "hidden", "vocabulary"))
    states = random_tensor(case, generator, tokens, hidden).requires_grad_()
    # Of full float32 precision: what three bf16 parts hold and one does not.
    weight = torch.randn(size, hidden, generator=generator, device=case.device) / hidden**0.5
    grad = torch.randn(tokens, size, generator=generator, device=case.device)
    return Inputs((states, nn.Parameter(weight)), grads=(grad,))


def _head(weight: Tensor) -> nn.Module:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = weight  # pyright: ignore[reportAttributeAccessIssue] - a parameter
    return made


def _ours(states: Tensor, weight: Tensor) -> Call:
    head, parts = _head(weight), weight_parts(weight)
    return lambda: lm_head_logits(head, states, precision="bf16x3", weight_parts=parts).logits


def _ours_split(states: Tensor, weight: Tensor) -> Call:
    head = _head(weight)
    return lambda: lm_head_logits(head, states, precision="bf16x3").logits


def _ours_bf16(states: Tensor, weight: Tensor) -> Call:
    head = _head(weight)
    return lambda: lm_head_logits(head, states, precision="bf16").logits


def _fp32(states: Tensor, weight: Tensor) -> Call:
    return lambda: functional.linear(states.float(), weight)


def _bf16(states: Tensor, weight: Tensor) -> Call:
    return lambda: functional.linear(states, weight.to(states.dtype)).float()


def _tf32(states: Tensor, weight: Tensor) -> Call:
    function: Any = _InTF32
    return lambda: function.apply(states.float(), weight)


class _InTF32(torch.autograd.Function):
    """What torch computes where TF32 is allowed, which it is during each of these calls only."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(states, weight)
        with _tf32_allowed():
            return functional.linear(states, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        states, weight = ctx.saved_tensors
        with _tf32_allowed():
            return grad @ weight, grad.T @ states


@contextmanager
def _tf32_allowed() -> Generator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


HEAD = Op(
    (_case(4096, 4096, 128256), _case(128, 128, 1024, QUICK)),
    inputs=_inputs,
    exact=by_autograd(functional.linear),
    ways={
        OURS: _ours,
        OURS_SPLIT: _ours_split,
        OURS_BF16: _ours_bf16,
        TORCH: _fp32,
        TORCH_TF32: _tf32,
        TORCH_BF16: _bf16,
    },
    ceiling=head_products,
)
