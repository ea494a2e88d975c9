"""`swiglu` as an operator that torch knows, for compilers, DTensors and dispatch modes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from automodel_fn.ops._choice import kernel_choice
from automodel_fn.ops._swiglu_torch import gradients, in_place


@torch.library.custom_op("automodel_fn::swiglu", mutates_args=())
def multiplied(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, contiguous."""
    if kernel_choice(gate=gate, up=up).name == "triton":
        from automodel_fn.ops._swiglu_triton import forward

        return forward(gate, up)
    return in_place(gate, up).contiguous()


@torch.library.custom_op("automodel_fn::swiglu_backward", mutates_args=())
def _backward(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    from automodel_fn.ops._swiglu_triton import backward

    return backward(dy, gate, up)


@multiplied.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@_backward.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save_inputs(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = ctx.saved_tensors
    by = _backward if kernel_choice(gate=gate, up=up).name == "triton" else gradients
    return by(dy, gate, up)


multiplied.register_autograd(_gradients, setup_context=_save_inputs)


def _places(gate: Any) -> list[Any]:
    return [Replicate(), *(Shard(dim) for dim in range(len(gate.shape)))]


@register_sharding(torch.ops.automodel_fn.swiglu.default)
def _(gate: Any, up: Any) -> list[Any]:
    return [([place], [place, place]) for place in _places(gate)]


@register_sharding(torch.ops.automodel_fn.swiglu_backward.default)
def _(dy: Any, gate: Any, up: Any) -> list[Any]:
    return [([place, place], [place, place, place]) for place in _places(gate)]
