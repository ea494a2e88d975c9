"""The loss of a head as an operator of torch's dispatcher.

For what traces (`torch.compile`, fake and meta tensors) and for DTensors: hidden states and labels
may be sharded on any leading dimension, and the gradient of the weight is then a partial sum.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Partial, Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from automodel_fn.errors import ConfigError
from automodel_fn.ops._loss_autograd import (
    NO_SECOND_DERIVATIVE,
    Numbers,
    computed,
    flat_inputs,
    gradients_of,
    reduced,
    settings_of,
)
from automodel_fn.ops._loss_chunks import Wanted
from automodel_fn.ops._loss_sums import kept_dtype, sum_dtype_of


@torch.library.custom_op("automodel_fn::lm_head_loss", mutates_args=())
def _loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    softcap: float | None,
    operand_dtype: torch.dtype,
    is_split: bool,
    chunk_size: int | None,
    is_summed: bool,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    numbers = (ignore_index, label_smoothing, z_loss, softcap)
    settings = settings_of(numbers, operand_dtype, is_split, chunk_size, is_summed)
    inputs = flat_inputs(hidden, weight, bias, labels, scale)
    found = computed(inputs, settings, _wanted(wants))
    loss, of_z = reduced(found, labels, scale, is_summed=is_summed)
    return loss, of_z, *_present(gradients_of(found, hidden), hidden)


def _wanted(wants: list[bool]) -> Wanted:
    return Wanted(wants[0], weight=wants[1], bias=wants[2])


def _present(gradients: list[Tensor | None], like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # An operator returns no None.
    first, second, third = (
        like.new_empty(0) if gradient is None else gradient for gradient in gradients
    )
    return first, second, third


def _empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, operand_dtype: torch.dtype, wants: Any
) -> tuple[Tensor, Tensor, Tensor]:
    sums = sum_dtype_of(operand_dtype)
    dtypes = (kept_dtype(hidden, sums), kept_dtype(weight, sums), sums)
    found = [
        tensor.new_empty(tensor.shape, dtype=dtype) if is_wanted and tensor is not None else None
        for tensor, dtype, is_wanted in zip((hidden, weight, bias), dtypes, wants, strict=True)
    ]
    return _present(found, hidden)


@_loss.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, *rest: Any) -> Any:
    operand_dtype, _, _, is_summed, wants = rest[5:]
    shape = () if is_summed else labels.shape
    parts = (hidden.new_empty(shape, dtype=sum_dtype_of(operand_dtype)) for _ in range(2))
    return *parts, *_empty_gradients(hidden, weight, bias, operand_dtype, wants)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.numbers = *inputs[:5], inputs[5:]
    ctx.is_summed = inputs[-2]
    ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in tensors[:3]]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*(output[2:] if ctx.is_summed else tensors))


def _backward(ctx: Any, upstream: Tensor | None, *others: Tensor | None) -> tuple[Any, ...]:
    if any(other is not None for other in others):
        raise ConfigError(NO_SECOND_DERIVATIVE)
    nothing = (None,) * 11
    if upstream is None:
        return None, None, None, *nothing
    if ctx.is_summed:
        gradients = [gradient * upstream for gradient in ctx.saved_tensors]
    else:
        hidden, weight, bias, labels, scale = ctx.saved_tensors
        wants = list(ctx.needs_input_grad[:3])
        # The same once more, now with gradients: each token has a scale of its own.
        scale = scale * upstream
        gradients = _loss(hidden, weight, bias, labels, scale, *ctx.numbers[:-1], wants)[2:]
    chosen = zip(gradients, ctx.dtypes, ctx.needs_input_grad[:3], strict=True)
    found = [gradient.to(dtype) if needed else None for gradient, dtype, needed in chosen]
    return *found, *nothing


_loss.register_autograd(_backward, setup_context=_save)


@register_sharding(torch.ops.automodel_fn.lm_head_loss.default)
def _(hidden: Any, *rest: Any) -> list[Any]:
    _, bias, _, scale, *_, is_summed, wants = rest
    options = []
    for place in (Replicate(), *(Shard(dim) for dim in range(len(hidden.shape) - 1))):
        is_sharded = isinstance(place, Shard)
        total = Partial() if is_sharded else Replicate()
        gradients = [place, total, total]
        outputs = [
            gradient if wanted else Replicate()
            for gradient, wanted in zip(gradients, wants, strict=True)
        ]
        part = total if is_summed else place
        scaling = place if len(scale.shape) else Replicate()
        tensors = [place, Replicate(), None if bias is None else Replicate(), place, scaling]
        options.append(([part, part, *outputs], tensors + [None] * 9))
    return options


def traced_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    scale: Tensor,
    numbers: Numbers,
    operand_dtype: torch.dtype,
    is_split: bool,
    chunk_size: int | None,
    *,
    is_summed: bool,
) -> tuple[Tensor, Tensor]:
    """The loss, and the part of it that is the z-loss, by an operator of the dispatcher."""
    grads = torch.is_grad_enabled()
    wants = [grads and t is not None and t.requires_grad for t in (hidden, weight, bias)]
    now = wants if is_summed else [False, False, False]
    rest = (*numbers, operand_dtype, is_split, chunk_size, is_summed, now)
    loss, of_z, *_ = _loss(hidden, weight, bias, labels, scale, *rest)
    return loss, of_z.detach()
