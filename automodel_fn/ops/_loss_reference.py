"""What `lm_head_loss` approximates: all logits at once, in float64."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


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
    """The loss in float64 by `F.cross_entropy`, differentiable any number of times.

    Args:
        hidden_states: `[..., H]`.
        weight: `[V, H]`.
        labels: `[...]`.
        bias: As for `lm_head_loss`, as all that follows.
        shift: The label of a position is the next one.
        ignore_index: The label of tokens that do not count.
        reduction: "mean", "sum" or "none".
        num_items_in_batch: Divides the sum.
        label_smoothing: The part of the target that is spread.
        z_loss: The factor of the squared log of the denominator.
        softcap: The cap, or None.

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
