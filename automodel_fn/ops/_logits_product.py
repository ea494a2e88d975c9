"""The product of hidden states and the weight of a head, with gradients, as exact as asked for.

One operator, opaque to `torch.compile`, so that the bits are those of eager mode.

Shapes: T is tokens, H the hidden dimension, V the vocabulary, P the number of parts of the weight.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import attrs
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

from automodel_fn.dtypes import dtype_name
from automodel_fn.errors import ConfigError, itemized
from automodel_fn.ops._autocast import without_autocast
from automodel_fn.ops._heads import LogitsPrecision
from automodel_fn.ops._logits_sharded import product_of_shards
from automodel_fn.ops._products import (
    hidden_gradient,
    logits_by_parts,
    logits_by_splitting,
    weight_gradient,
)
from automodel_fn.ops._split import num_parts_of
from automodel_fn.ops._weight_parts import WeightParts, demand_no_capture, weight_parts


@attrs.frozen
class LogitsPath:
    """How logits are made of given tensors, and why.

    Args:
        name: "bf16" (products of bfloat16 operands, or of the parts of the weight, added in
            float32) or "fp32" (products of float32).
        reason: Why so, such as "hidden_states is on cpu".

    Example:
        >>> LogitsPath("fp32", reason="hidden_states is on cpu").name
        'fp32'
    """

    name: Literal["bf16", "fp32"]
    reason: str = attrs.field(kw_only=True)


def logits_path(
    hidden_states: Tensor,
    weight: Tensor | WeightParts,
    *,
    precision: LogitsPrecision,
) -> LogitsPath:
    """How `lm_head_logits` makes logits in a precision. Splits a weight that is not yet split.

    Args:
        hidden_states: `[B, S, H]` or `[T, H]`.
        weight: `[V, H]`, or its parts.
        precision: As for `lm_head_logits`.

    Example:
        >>> logits_path(torch.ones(1, 2).bfloat16(), torch.ones(3, 2), precision="bf16x3")
        LogitsPath(name='fp32', reason='hidden_states is on cpu')
    """
    if precision != "bf16x3":
        return LogitsPath(precision, reason=f"precision={precision!r}")
    if not hidden_states.is_cuda:
        return LogitsPath("fp32", reason=f"hidden_states is on {hidden_states.device.type}")
    parts = weight if isinstance(weight, WeightParts) else weight_parts(weight)
    if not parts.is_exact:
        return LogitsPath("fp32", reason="bf16 parts do not hold every number of the weight")
    return LogitsPath("bf16", reason="bf16 parts hold every number of the weight")


def logits_product(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    precision: LogitsPrecision,
    parts: WeightParts | None = None,
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`hidden @ weight.T + bias`, made in float32 and rounded once.

    Args:
        hidden: `[..., H]`, bfloat16; with "fp32" of any dtype.
        weight: `[V, H]`, float32, float16 or bfloat16.
        bias: `[V]`, or None.
        precision: As for `lm_head_logits`.
        parts: Of the weight as it is now; None splits some rows at a time, and waits for the device
            once to know that this was exact.
        out_dtype: Of the result.

    Returns:
        `[..., V]`.

    Raises:
        ConfigError: An argument is not as described.
    """
    if isinstance(weight, DTensor) or isinstance(hidden, DTensor):
        options = {"precision": precision, "parts": parts, "out_dtype": out_dtype}
        return product_of_shards(hidden, weight, bias, partial(logits_product, **options))
    _demand_fitting(hidden, weight, precision, parts)
    mode, stacked = precision, None
    if precision == "bf16":
        stacked = None if parts is None else parts.high
    elif precision == "bf16x3" and parts is not None:
        mode = "parts" if logits_path(hidden, parts, precision=precision).name == "bf16" else "fp32"
        stacked = parts.stacked if mode == "parts" else None
    elif precision == "bf16x3":
        mode = "split" if hidden.is_cuda else "fp32"
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits, _ = _product(flat, weight, bias, stacked, mode, out_dtype)
    return logits.unflatten(0, hidden.shape[:-1]) if hidden.dim() != 2 else logits


def _demand_fitting(
    hidden: Tensor, weight: Tensor, precision: LogitsPrecision, parts: WeightParts | None
) -> None:
    lines: list[str] = []
    if precision != "fp32" and hidden.dtype != torch.bfloat16:
        lines.append(
            f"hidden_states has the dtype {dtype_name(hidden.dtype)}; precision={precision!r} "
            "takes bf16: cast them, or use precision='fp32' (FSDP2 casts what comes in to "
            "param_dtype, unless cast_forward_inputs=False)"
        )
    if num_parts_of(weight.dtype) is None:
        found = dtype_name(weight.dtype)
        lines.append(f"weight has the dtype {found}; it must be fp32, fp16 or bf16")
    if hidden.shape[-1] != weight.shape[-1]:
        sizes = f"{hidden.shape[-1]} and {weight.shape[-1]}"
        lines.append(f"hidden_states and weight have the hidden sizes {sizes}; they must be equal")
    if parts is not None:
        shape = (weight.shape[0], parts.num_parts * weight.shape[1])
        found, device = tuple(parts.stacked.shape), parts.stacked.device
        if found != shape or device != weight.device:
            lines.append(
                f"weight_parts is {found} on {device}; for this weight it must be {shape} on "
                f"{weight.device}, as weight_parts(weight) makes it"
            )
    if lines:
        raise ConfigError(itemized("logits cannot be computed:", lines))


@torch.library.custom_op("automodel_fn::logits_product", mutates_args=())
def _product(
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


@_product.register_fake
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


_product.register_autograd(_backward, setup_context=_save)
