"""The operator behind `logits_product`, with its gradients; opaque to `torch.compile`.

Shapes: T is tokens, H the hidden dimension, V the vocabulary, P the number of parts of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from automodel_fn.errors import ConfigError
from automodel_fn.ops._autocast import without_autocast
from automodel_fn.ops._products import (
    hidden_gradient,
    logits_by_parts,
    logits_by_splitting,
    weight_gradient,
)
from automodel_fn.ops._weight_parts import WeightParts, demand_no_capture


@torch.library.custom_op("automodel_fn::logits_product", mutates_args=())
def logits_operator(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stacked: Tensor | None,
    mode: str,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Logits `[T, V]`, and on the CPU whether they are products of bfloat16.

    `mode` is "fp32", "bf16" (`stacked`: the rounded weight, if there is one), "parts" (those in
    `stacked`) or "split" (parts made here, float32 where they turn out not to be exact).
    """
    with without_autocast(hidden):
        logits = None
        if mode == "split":
            demand_no_capture(hidden)
            logits, is_exact = logits_by_splitting(hidden, weight)
            logits = logits if bool(is_exact) else None
        elif mode != "fp32":
            logits = logits_by_parts(hidden, _given_parts(hidden, weight, stacked))
        is_bf16 = torch.tensor(logits is not None)
        if logits is None:
            wide_bias = None if bias is None else bias.float()
            logits = functional.linear(hidden.float(), weight.float(), wide_bias)
        elif bias is not None:
            logits += bias
        return logits.to(out_dtype), is_bf16


@logits_operator.register_fake
def _(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    logits = hidden.new_empty(hidden.shape[0], weight.shape[0], dtype=rest[-1])
    return logits, torch.empty((), dtype=torch.bool, device="cpu")


def _given_parts(hidden: Tensor, weight: Tensor, stacked: Tensor | None) -> WeightParts:
    found = weight.to(torch.bfloat16) if stacked is None else stacked
    num_parts = found.shape[1] // hidden.shape[1] if hidden.shape[1] else 1
    return WeightParts(found, num_parts=num_parts, is_exact=True)


@torch.library.custom_op("automodel_fn::logits_product_gradients", mutates_args=())
def _gradients(
    grad: Tensor,
    hidden: Tensor,
    weight: Tensor,
    stacked: Tensor | None,
    is_bf16: Tensor,
    mode: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """Of the hidden states and of the weight; one that is not wanted is empty."""
    of_hidden, of_weight = hidden.new_empty(0), weight.new_empty(0)
    with without_autocast(grad):
        if not bool(is_bf16):
            wide = grad.float()
            of_hidden = (wide @ weight.float()).to(hidden.dtype) if wanted[0] else of_hidden
            of_weight = (wide.t() @ hidden.float()).to(weight.dtype) if wanted[1] else of_weight
            return of_hidden, of_weight
        grad = grad.to(torch.bfloat16) if mode == "bf16" else grad
        if wanted[0]:
            is_split = mode == "split"
            factor = weight if is_split else _given_parts(hidden, weight, stacked)
            of_hidden = hidden_gradient(grad, factor)
        if wanted[1]:
            of_weight = weight_gradient(grad, hidden, weight.dtype)
    return of_hidden, of_weight


@_gradients.register_fake
def _(grad: Tensor, hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    wanted = rest[-1]
    return (
        hidden.new_empty(hidden.shape if wanted[0] else 0),
        weight.new_empty(weight.shape if wanted[1] else 0),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    hidden, weight, bias, stacked, ctx.mode, _ = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(hidden, weight, stacked, output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    hidden, weight, stacked, is_bf16 = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    found = _gradients(grad, hidden, weight, stacked, is_bf16, ctx.mode, wanted)
    of_hidden, of_weight = (
        part if want else None for part, want in zip(found, wanted, strict=True)
    )
    of_bias = None
    if ctx.needs_input_grad[2]:
        of_bias = grad.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return of_hidden, of_weight, of_bias, None, None, None


logits_operator.register_autograd(_backward, setup_context=_save)


def _refuse(ctx: Any, *grads: Any) -> Any:
    raise ConfigError(
        "logits of precision='bf16x3' or 'bf16', and those of an LMHead, have no second derivative; "
        "use precision='fp32' of a plain head for one."
    )


_gradients.register_autograd(_refuse)
