"""The loss of a head as one differentiable operation, eager and traced.

In eager mode an autograd function, which gives its gradients away in the backward; while
`torch.compile` traces, and for DTensors and fake tensors, an operator of torch's dispatcher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from automodel_fn.errors import ConfigError
from automodel_fn.ops._choice import KernelChoice, kernel_choice
from automodel_fn.ops._loss_chunks import ChunkedLoss, LossInputs, Wanted, chunked_loss
from automodel_fn.ops._loss_terms import LossTerms, write_token_losses

Numbers = tuple[int, float, float, float | None]
"""ignore_index, label_smoothing, z_loss, softcap."""
NO_SECOND_DERIVATIVE = (
    "lm_head_loss has no second derivative; take it of F.cross_entropy on full logits."
)


@attrs.frozen
class LossSettings:
    """How a loss is computed, beside its tensors.

    Args:
        terms: The terms of the loss.
        operand_dtype: What hidden states and weight are rounded to before they are multiplied.
        is_split: As for `chunked_loss`, as is `chunk_size`.
        is_summed: One number for all tokens, or one for each.
    """

    terms: LossTerms
    operand_dtype: torch.dtype = attrs.field(kw_only=True)
    is_split: bool = attrs.field(kw_only=True)
    chunk_size: int | None = attrs.field(kw_only=True)
    is_summed: bool = attrs.field(kw_only=True)


def settings_of(
    numbers: Numbers,
    operand_dtype: torch.dtype,
    is_split: bool,
    chunk_size: int | None,
    is_summed: bool,
) -> LossSettings:
    """The settings, of what an operator can be given."""
    ignore_index, label_smoothing, z_loss, softcap = numbers
    terms = LossTerms(
        ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap
    )
    return LossSettings(
        terms,
        operand_dtype=operand_dtype,
        is_split=is_split,
        chunk_size=chunk_size,
        is_summed=is_summed,
    )


def loss_kernel(hidden: Tensor, weight: Tensor, operand_dtype: torch.dtype) -> KernelChoice:
    """What computes the losses of a chunk."""
    if operand_dtype == torch.float64:
        return KernelChoice("torch", reason="products are made in float64")
    return kernel_choice(hidden_states=hidden, weight=weight)


def flat_inputs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, scale: Tensor
) -> LossInputs:
    """The inputs with one dimension of tokens."""
    return LossInputs(
        hidden.detach().reshape(-1, hidden.shape[-1]),
        weight=weight.detach(),
        bias=None if bias is None else bias.detach(),
        labels=labels.reshape(-1),
        scale=scale.reshape(-1) if scale.dim() else scale,
    )


def computed(inputs: LossInputs, settings: LossSettings, wanted: Wanted) -> ChunkedLoss:
    """The loss by the fastest way that there is for these inputs."""
    device = inputs.hidden.device
    write: Callable[..., None] = write_token_losses
    if loss_kernel(inputs.hidden, inputs.weight, settings.operand_dtype).name == "triton":
        from automodel_fn.ops import _loss_triton

        write = _loss_triton.write_token_losses
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return chunked_loss(
            inputs,
            settings.terms,
            wanted,
            operand_dtype=settings.operand_dtype,
            is_split=settings.is_split,
            chunk_size=settings.chunk_size,
            write=write,
        )


def reduced(found: ChunkedLoss, labels: Tensor, scale: Tensor, *, is_summed: bool) -> list[Tensor]:
    """The loss, and the part of it that is the z-loss: sums, or of each token."""
    parts = (found.losses, found.z_losses)
    if is_summed:
        return [part.sum() * scale for part in parts]
    return [part.view(labels.shape) for part in parts]


class EagerLoss(torch.autograd.Function):
    """The loss, and the part of it that is the z-loss, for plain tensors.

    Gradients are computed in the forward and given away in the first backward. A further backward
    of a retained graph computes them anew, as does the backward of losses that were not summed.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        scale: Tensor,
        settings: LossSettings,
        wanted: Wanted,
    ) -> tuple[Tensor, Tensor]:
        inputs = flat_inputs(hidden, weight, bias, labels, scale)
        now = wanted if settings.is_summed else Wanted(False, weight=False, bias=False)
        found = computed(inputs, settings, now)
        ctx.save_for_backward(hidden, weight, bias, labels, scale)
        ctx.settings, ctx.wanted = settings, wanted
        ctx.gradients = gradients_of(found, hidden) if settings.is_summed else None
        ctx.set_materialize_grads(False)
        loss, z_loss = reduced(found, labels, scale, is_summed=settings.is_summed)
        ctx.mark_non_differentiable(z_loss)
        return loss, z_loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        upstream = grad_outputs[0]
        if upstream is None:
            return (None,) * 7
        # Taken from the node, so that autograd may keep these very tensors as .grad.
        gradients, ctx.gradients = ctx.gradients, None
        with torch.no_grad():
            if gradients is None:
                gradients = gradients_again(ctx.saved_tensors, upstream, ctx.settings, ctx.wanted)
            else:
                for gradient in gradients:
                    multiply_(gradient, upstream)
        if torch.is_grad_enabled():
            inputs = [tensor for tensor in ctx.saved_tensors if tensor is not None]
            gradients = [
                None if gradient is None else FirstOrderOnly.apply(gradient, *inputs)
                for gradient in gradients
            ]
        return (*gradients, None, None, None, None)


class FirstOrderOnly(torch.autograd.Function):
    """A gradient that depends on tensors in a way that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *inputs: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise ConfigError(NO_SECOND_DERIVATIVE)


def gradients_of(found: ChunkedLoss, hidden: Tensor) -> list[Tensor | None]:
    """The gradients of the hidden states, in their shape, of the weight and of the bias."""
    of_hidden = None if found.of_hidden is None else found.of_hidden.view(hidden.shape)
    return [of_hidden, found.of_weight, found.of_bias]


def gradients_again(
    tensors: tuple[Any, ...], upstream: Tensor, settings: LossSettings, wanted: Wanted
) -> list[Tensor | None]:
    """The gradients for an upstream gradient of any shape, from the inputs of the loss."""
    hidden, weight, bias, labels, scale = tensors
    inputs = flat_inputs(hidden, weight, bias, labels, scale * upstream)
    return gradients_of(computed(inputs, settings, wanted), hidden)


def multiply_(gradient: Tensor | None, upstream: Tensor) -> None:
    """Multiply in place by a number on the device; by 1 it costs next to nothing."""
    if gradient is None:
        return
    if kernel_choice(gradient=gradient).name == "triton":
        from automodel_fn.ops import _loss_triton

        _loss_triton.multiply_(gradient, upstream)
    elif gradient.is_cuda or upstream != 1:
        gradient.mul_(upstream)


def eager_loss(
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
    """The loss, and the part of it that is the z-loss, of plain tensors."""
    settings = settings_of(numbers, operand_dtype, is_split, chunk_size, is_summed)
    is_on = torch.is_grad_enabled()
    wanted = Wanted(
        is_on and hidden.requires_grad,
        weight=is_on and weight.requires_grad,
        bias=is_on and bias is not None and bias.requires_grad,
    )
    return EagerLoss.apply(hidden, weight, bias, labels, scale, settings, wanted)
