"""Law of the loss of a head: that of all logits in float64, within what its roundings can do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from automodel_fn.ops._loss import lm_head_loss, lm_head_loss_reference
from automodel_fn.testing._facts import demand, fact_of, wrong_elements

# What a tanh, an exponential or a logarithm of float32 may be off by, in halves of its epsilon.
_FUNCTIONS = 32


def check_lm_head_loss(
    hidden_states: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    **options: Any,
) -> None:
    """Law: in chunks of any size, `lm_head_loss` and its gradients are those of all logits.

    Allowed is what float32 sums of the products can lose, whatever their order, carried through the
    derivatives of the loss, and one rounding to the dtype of each gradient; where products are made
    in bfloat16, one of the gradients of the logits too. What is given must be as it was.

    Args:
        hidden_states: `[..., H]`, of the dtype of the weight.
        weight: `[V, H]`: float16, bfloat16 or float32.
        labels: `[...]`.
        bias: `[V]`, or None.
        chunk_size: As for `lm_head_loss`.
        options: Others of `lm_head_loss`, but for `precision`.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> check_lm_head_loss(torch.ones(3, 2), torch.eye(2), torch.tensor([0, 1, 1]))
    """
    given = [tensor for tensor in (hidden_states, weight, labels, bias) if tensor is not None]
    before = [fact_of(tensor) for tensor in given]
    own = [_leaf(tensor) for tensor in (hidden_states, weight, bias)]
    wide = [_leaf(tensor, torch.float64) for tensor in (hidden_states, weight, bias)]
    exact = lm_head_loss_reference(wide[0], wide[1], labels, bias=wide[2], **options)
    found = lm_head_loss(own[0], own[1], labels, bias=own[2], chunk_size=chunk_size, **options).loss
    demand(found.dtype == torch.float32, f"the loss is {found.dtype}, not float32")
    demand(found.shape == exact.shape, f"the loss has the shape {found.shape}, not {exact.shape}")
    exact.sum().backward()
    found.sum().backward()
    for tensor, was in zip(given, before, strict=True):
        demand(not wrong_elements(fact_of(tensor), was), "lm_head_loss changed what it was given")
    of_loss, of_gradients = _allowed(hidden_states, weight, labels, bias, options)
    _demand_near("the loss", found, exact, of_loss)
    names = ("hidden_states", "weight", "bias")
    for name, ours, theirs, slack in zip(names, own, wide, of_gradients, strict=True):
        if ours is not None and theirs is not None and slack is not None:
            demand(ours.grad is not None, f"{name} has no gradient")
            rounding = torch.finfo(ours.dtype).eps / 2 * theirs.grad.abs()
            least = torch.finfo(ours.dtype).smallest_normal * torch.finfo(ours.dtype).eps
            _demand_near(
                f"the gradient of {name}", ours.grad, theirs.grad, slack + rounding + least
            )


def _leaf(tensor: Tensor | None, dtype: torch.dtype | None = None) -> Any:
    if tensor is None:
        return None
    # Of its own dtype it is the same memory, in its own strides.
    return tensor.detach().to(dtype or tensor.dtype).requires_grad_()


def _allowed(
    hidden: Tensor, weight: Tensor, labels: Tensor, bias: Tensor | None, options: dict[str, Any]
) -> tuple[Tensor, list[Tensor | None]]:
    """How far off the loss may be, and the gradients before they are rounded."""
    unit = torch.finfo(torch.float32).eps / 2
    flat = hidden.detach().double().reshape(-1, hidden.shape[-1])
    size, wide = flat.abs(), weight.detach().double()
    offsets = torch.zeros(len(wide), dtype=torch.float64, device=wide.device)
    offsets = offsets if bias is None else bias.detach().double()
    logits = flat @ wide.t() + offsets
    largest = (size @ wide.abs().t() + offsets.abs()).amax(-1)
    cap = options.get("softcap")
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
        largest = largest + cap
    off = (flat.shape[1] + _FUNCTIONS) * unit * (largest + 1)
    z_loss = options.get("z_loss", 0.0)
    lse = torch.logsumexp(logits, -1).abs() + off + 1
    # A loss moves twice as far as the logits do, and sums over the vocabulary round: that of the
    # softmax within a logarithm, that of smoothing with the size of its logits.
    slope = 1 + 2 * z_loss * lse
    sums = len(wide) * unit * (1 + options.get("label_smoothing", 0.0) * largest)
    of_token = 4 * slope * (off + sums + _FUNCTIONS * unit * lse)
    scale = _scale(labels, options)
    of_loss = _reduced(of_token, labels, options, scale)
    is_narrow = hidden.is_cuda and weight.dtype == torch.bfloat16
    rounding = torch.finfo(torch.bfloat16).eps if is_narrow else unit * _FUNCTIONS
    part = 4 * off + 2 * rounding + 2 * (len(wide) + len(flat)) * unit
    terms = _terms(logits, labels, slope, options)
    # What underflows is lost in absolute terms.
    of_logits = scale * (part.unsqueeze(1) * terms + torch.finfo(torch.float32).smallest_normal)
    return of_loss, [
        (of_logits @ wide.abs()).view(hidden.shape),
        of_logits.t() @ size,
        None if bias is None else of_logits.sum(0),
    ]


def _terms(logits: Tensor, labels: Tensor, slope: Tensor, options: dict[str, Any]) -> Tensor:
    """How large the terms of the gradients of logits `[T, V]` are together, without their signs."""
    classes = labels.roll(-1, -1) if options.get("shift") else labels
    is_label = classes.reshape(-1, 1) == torch.arange(logits.shape[1], device=logits.device)
    smoothing = options.get("label_smoothing", 0.0)
    softmax = torch.softmax(logits, -1) * slope.unsqueeze(1)
    return softmax + smoothing / logits.shape[1] + (1 - smoothing) * is_label


def _scale(labels: Tensor, options: dict[str, Any]) -> float:
    if options.get("reduction", "mean") != "mean":
        return 1.0
    items = options.get("num_items_in_batch")
    counted = labels[..., 1:] if options.get("shift") else labels
    num_tokens = int((counted != options.get("ignore_index", -100)).sum())
    return 1 / max(num_tokens if items is None else float(items), 1e-30)


def _reduced(of_token: Tensor, labels: Tensor, options: dict[str, Any], scale: float) -> Tensor:
    if options.get("reduction", "mean") == "none":
        return of_token.view(labels.shape)
    # The sum over tokens rounds as well, and each token is at most so large.
    return scale * of_token.sum() * 2


def _demand_near(name: str, found: Tensor, exact: Tensor, slack: Tensor) -> None:
    found, exact = found.detach().double(), exact.detach()
    is_right = ((found - exact).abs() <= slack) | (found.isnan() & exact.isnan())
    for place in (~is_right).nonzero().tolist()[:1]:
        at = tuple(place)
        values = [tensor.expand_as(exact)[at].item() for tensor in (found, exact, slack)]
        raise AssertionError(
            f"{name} is {values[0]} at {at}, {values[1]} +- {values[2]} is allowed"
        )
