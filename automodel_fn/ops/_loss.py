"""The loss of a language model, from its last hidden states, without all logits at once.

Shapes: `[..., H]` is any number of leading dimensions, then the hidden one; V is the vocabulary.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from automodel_fn.errors import ConfigError, itemized
from automodel_fn.ops._choice import KernelChoice, is_plain, is_watched
from automodel_fn.ops._heads import LogitsPrecision
from automodel_fn.ops._loss_autograd import eager_loss, loss_kernel
from automodel_fn.ops._loss_checks import (
    complaints_about_choices,
    complaints_about_tensors,
    complaints_about_terms,
    demand_labels,
    demand_no_transform,
)
from automodel_fn.ops._loss_op import traced_loss
from automodel_fn.ops._loss_sums import sum_dtype_of

Reduction = Literal["mean", "sum", "none"]


class LMHeadLoss(NamedTuple):
    """What `lm_head_loss` returns. A tuple, because FSDP2 looks for tensors in no other classes.

    Args:
        loss: `[]`, or `[...]` where it is not reduced: all terms together, to call backward on.
        z_loss: The part of it that is the z-loss, detached, of the same shape.
        num_tokens: `[]`, integer: how many labels are not ignored.

    Example:
        >>> hidden, weight = torch.zeros(3, 4), torch.zeros(8, 4)
        >>> lm_head_loss(hidden, weight, torch.tensor([1, 2, -100])).num_tokens
        tensor(2)
    """

    loss: Tensor
    z_loss: Tensor
    num_tokens: Tensor


def lm_head_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    num_items_in_batch: int | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    precision: LogitsPrecision | None = None,
    chunk_size: int | None = None,
) -> LMHeadLoss:
    """`F.cross_entropy(F.linear(hidden_states, weight), labels)`, in chunks of tokens.

    Logits are float32 sums of products, those of some tokens at a time, and the softmax is computed
    in float32. The gradients are computed on the way, so that the backward hands them out;
    of a second backward of one graph, and of reduction="none", it computes the logits once more.
    The gradient of the weight is summed over all chunks in float32 and rounded once. A second
    derivative is an error.

    What is ignored has no part in the loss and gets a gradient of 0. Where every label is ignored
    the mean is NaN, as that of `F.cross_entropy`. A label outside of the vocabulary is an error on
    the CPU; on a GPU, which nothing waits for, it makes the loss and the gradients NaN.

    Args:
        hidden_states: `[..., H]`, floating point.
        weight: `[V, H]`, floating point: the weight of the head.
        labels: `[...]`, int64 or int32: a class for each hidden state.
        bias: `[V]`, or None.
        shift: The label of a position is the next one along the last dimension of `labels`, as
            causal language models are trained; the last position has none. Nothing is copied.
        ignore_index: The label of tokens that do not count.
        reduction: "mean" over the labels that count, "sum", or "none".
        num_items_in_batch: Divides the sum in place of the number of labels that count: their
            number in all microbatches of an optimizer step. Needs reduction="mean".
        label_smoothing: 0 to 1: the part of the target that is spread evenly over the vocabulary.
        z_loss: At least 0; adds `z_loss * logsumexp(logits) ** 2` to the loss of every token.
        softcap: Logits become `softcap * tanh(logits / softcap)`; None leaves them.
        precision: What is multiplied in. None: the dtype of the weight, or autocast's where that is
            on, as `F.linear` does. "bf16": all factors rounded to bfloat16. "fp32": float32, where
            torch's own setting says whether a GPU makes TF32 of it. "bf16x3": bfloat16 hidden
            states, and the weight and the gradients of logits as sums of bfloat16 parts: close to
            "fp32", in a fraction of its time; on the CPU it is "fp32". float16 is multiplied in
            float32, since gradients of logits are below its range.
        chunk_size: Tokens whose gradients of logits, in the dtype of the products, are held at a
            time. None holds those of all that fit into 2 GiB (1 GiB of float32), else chunks of at
            most 1 GiB.

    Returns:
        The loss in float32 (float64 for float64), with what it is made of.

    Raises:
        ConfigError: An argument is not as described.

    Source:
        Liger Kernel's `LigerFusedLinearCrossEntropyLoss`, for gradients in the forward; z-loss:
        PaLM (arXiv 2204.02311), section 5; soft cap: Gemma 2 (arXiv 2408.00118), section 2.

    Example:
        >>> hidden, weight = torch.zeros(1, 3, 4), torch.zeros(8, 4, requires_grad=True)
        >>> found = lm_head_loss(hidden, weight, torch.tensor([[1, 2, 3]]), shift=True)
        >>> found.loss.backward()
        >>> round(found.loss.item(), 4), found.num_tokens.item(), weight.grad.shape
        (2.0794, 2, torch.Size([8, 4]))
    """
    complaints = [
        *complaints_about_tensors(hidden_states, weight, labels, bias, precision),
        *complaints_about_terms(ignore_index, label_smoothing, z_loss, softcap),
        *complaints_about_choices(reduction, precision, num_items_in_batch, chunk_size),
    ]
    if complaints:
        raise ConfigError(itemized("lm_head_loss cannot be computed:", complaints))
    if shift:
        labels = shifted(labels, ignore_index)
    num_tokens = (labels != ignore_index).sum()
    operand_dtype = operand_dtype_of(weight, precision)
    divisor = num_tokens if num_items_in_batch is None else num_items_in_batch
    scale = _scale(num_tokens, divisor if reduction == "mean" else 1, operand_dtype)
    tensors = (hidden_states, weight, bias, labels, scale)
    numbers = (ignore_index, label_smoothing, z_loss, softcap)
    run = traced_loss
    if not _needs_operator(hidden_states, weight, bias, labels):
        run = eager_loss
        if labels.device.type == "cpu":
            demand_labels(labels, len(weight), ignore_index)
    how = (operand_dtype, precision == "bf16x3", chunk_size)
    loss, of_z = run(*tensors, numbers, *how, is_summed=reduction != "none")
    return LMHeadLoss(loss, of_z, num_tokens)


def lm_head_loss_reference(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    reduction: str = "mean",
    num_items_in_batch: float | Tensor | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """What `lm_head_loss` approximates: in float64, of all logits at once, by `F.cross_entropy`.

    Differentiable any number of times. Takes what `lm_head_loss` takes.

    Example:
        >>> hidden, weight = torch.zeros(1, 4), torch.zeros(8, 4)
        >>> lm_head_loss_reference(hidden, weight, torch.tensor([1]))
        tensor(2.0794, dtype=torch.float64)
    """
    wide = None if bias is None else bias.double()
    logits = functional.linear(hidden_states.double(), weight.double(), wide)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    shape = labels.shape
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    flat, classes = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1).long()
    losses = functional.cross_entropy(
        flat,
        classes,
        ignore_index=ignore_index,
        reduction="none",
        label_smoothing=label_smoothing,
    )
    counts = classes != ignore_index
    losses = losses + torch.where(counts, z_loss * torch.logsumexp(flat, -1).square(), 0.0)
    if reduction == "none":
        of_tokens = losses.new_zeros(shape)
        of_tokens[..., : labels.shape[-1]] = losses.view(labels.shape)
        return of_tokens
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (counts.sum() if num_items_in_batch is None else num_items_in_batch)


def lm_head_loss_kernel(
    hidden_states: Tensor, weight: Tensor, *, precision: LogitsPrecision | None = None
) -> KernelChoice:
    """What computes losses and gradients of logits in `lm_head_loss`; products are torch's.

    Args:
        hidden_states: `[..., H]`.
        weight: `[V, H]`.
        precision: As for `lm_head_loss`.

    Example:
        >>> lm_head_loss_kernel(torch.ones(2, 4), torch.ones(8, 4))
        KernelChoice(name='torch', reason='hidden_states is on cpu')
    """
    return loss_kernel(hidden_states, weight, operand_dtype_of(weight, precision))


def operand_dtype_of(weight: Tensor, precision: LogitsPrecision | None) -> torch.dtype:
    """What hidden states and weight are rounded to before they are multiplied."""
    if precision == "bf16":
        return torch.bfloat16
    if precision is not None:
        return sum_dtype_of(weight.dtype)
    device = weight.device.type
    if device != "meta" and weight.dtype != torch.float64 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def shifted(labels: Tensor, ignore_index: int) -> Tensor:
    """The labels one position earlier along the last dimension; the last one is ignored."""
    last = torch.full_like(labels[..., :1], ignore_index)
    return torch.cat((labels[..., 1:], last), -1)


def _needs_operator(*tensors: Tensor | None) -> bool:
    if torch.compiler.is_compiling():
        return True
    given = [tensor for tensor in tensors if tensor is not None]
    demand_no_transform(given)
    return is_watched() or any(not is_plain(tensor) or tensor.is_meta for tensor in given)


def _scale(num_tokens: Tensor, divisor: int | Tensor, operand_dtype: torch.dtype) -> Tensor:
    dtype = sum_dtype_of(operand_dtype)
    if isinstance(divisor, Tensor):
        return divisor.to(num_tokens.device, dtype).reshape(()).reciprocal()
    return torch.full_like(num_tokens, divisor, dtype=dtype).reciprocal()
