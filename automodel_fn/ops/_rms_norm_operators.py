"""RMSNorm as operators that torch knows, for compilers, DTensors and dispatch modes.

To each of these it is one opaque call: what is compiled has the bits of eager mode, since the
same code computes it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from automodel_fn.ops._choice import kernel_choice
from automodel_fn.ops._rms_norm_torch import Gradients, added, gradients, in_place


@torch.library.custom_op("automodel_fn::rms_norm_fp32", mutates_args=())
def normed(x: Tensor, weight: Tensor | None, eps: float, weight_multiply: str) -> Tensor:
    """The norm, contiguous."""
    if kernel_choice(x=x, weight=weight).name == "triton":
        from automodel_fn.ops._rms_norm_triton import forward

        found: Any = forward(x, None, weight, eps, weight_multiply == "input")
        return found
    return in_place(x, weight, eps, weight_multiply).contiguous()


@torch.library.custom_op("automodel_fn::add_rms_norm_fp32", mutates_args=())
def added_and_normed(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_multiply: str
) -> tuple[Tensor, Tensor]:
    """The norm of the sum, and the sum, contiguous."""
    if kernel_choice(x=x, weight=weight, residual=residual).name == "triton":
        from automodel_fn.ops._rms_norm_triton import forward

        both: Any = forward(x, residual, weight, eps, weight_multiply == "input")
        return both
    total = added(x, residual).contiguous()
    return in_place(total, weight, eps, weight_multiply), total


@torch.library.custom_op("automodel_fn::rms_norm_fp32_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_multiply: str,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    from automodel_fn.ops._rms_norm_triton import backward

    is_rounded = weight_multiply == "input"
    dx, dweight = backward(x, weight, dy, dsum, eps, is_rounded, of_weight=of_weight)
    return dx, x.new_empty(0) if dweight is None else dweight


@normed.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, weight_multiply: str) -> Tensor:
    return x.new_empty(x.shape)


@added_and_normed.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_multiply: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@_backward.register_fake
def _(
    dy: Tensor,
    dsum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_multiply: str,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    dweight = x.new_empty(0) if weight is None or not of_weight else torch.empty_like(weight)
    return x.new_empty(x.shape), dweight


def _save_x(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, ctx.weight_multiply = inputs
    ctx.save_for_backward(x, weight)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, residual, weight, ctx.eps, ctx.weight_multiply = inputs
    ctx.residual_dtype = residual.dtype
    ctx.save_for_backward(output[1], weight)


def _gradients(ctx: Any, dy: Tensor, dsum: Tensor | None, wanted: tuple[bool, bool]) -> Gradients:
    x, weight = ctx.saved_tensors
    if kernel_choice(x=x, weight=weight).name == "triton":
        is_wanted = weight is not None and wanted[1]
        options = (ctx.eps, ctx.weight_multiply, is_wanted)
        dx, dweight = _backward(dy, dsum, x, weight, *options)
        return dx, dweight if is_wanted else None
    dx, dweight = gradients(dy, x, weight, ctx.eps, ctx.weight_multiply, wanted)
    return dx if dx is None or dsum is None else dx + dsum, dweight


def _of_norm(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
    return *_gradients(ctx, dy, None, ctx.needs_input_grad[:2]), None, None


def _of_added(ctx: Any, dy: Tensor, dsum: Tensor) -> tuple[Any, ...]:
    of_x, of_residual, of_weight = ctx.needs_input_grad[:3]
    dx, dweight = _gradients(ctx, dy, dsum, (of_x or of_residual, of_weight))
    dresidual = dx.to(ctx.residual_dtype) if dx is not None and of_residual else None
    return dx, dresidual, dweight, None, None


normed.register_autograd(_of_norm, setup_context=_save_x)
added_and_normed.register_autograd(_of_added, setup_context=_save_sum)


def _rows_apart(x: Any) -> list[Any]:
    return [Replicate(), *(Shard(dim) for dim in range(len(x.shape) - 1))]


@register_sharding(torch.ops.automodel_fn.rms_norm_fp32.default)
def _(x: Any, weight: Any, eps: float, weight_multiply: str) -> list[Any]:
    whole = None if weight is None else Replicate()
    return [([place], [place, whole, None, None]) for place in _rows_apart(x)]


@register_sharding(torch.ops.automodel_fn.add_rms_norm_fp32.default)
def _(x: Any, residual: Any, weight: Any, eps: float, weight_multiply: str) -> list[Any]:
    whole = None if weight is None else Replicate()
    return [([place] * 2, [place, place, whole, None, None]) for place in _rows_apart(x)]


@register_sharding(torch.ops.automodel_fn.rms_norm_fp32_backward.default)
def _(
    dy: Any,
    dsum: Any,
    x: Any,
    weight: Any,
    eps: float,
    weight_multiply: str,
    of_weight: bool,
) -> list[Any]:
    whole = None if weight is None else Replicate()
    found: list[Any] = []
    for place in _rows_apart(x):
        of_sum = None if dsum is None else place
        # Each device sums the gradient of the weight over its own rows.
        total = Partial() if of_weight and place != Replicate() else Replicate()
        options = (None, None, None)
        found.append(([place, total], [place, of_sum, place, whole, *options]))
    return found
