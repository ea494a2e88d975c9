"""The loss behind a model's own `labels=`, without its logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn

from automodel_fn.convert._overlay import Overlay, innermost
from automodel_fn.convert._settings import Behaviour, Namespace, own_class
from automodel_fn.nn._lm_head import LMHead
from automodel_fn.ops._loss import lm_head_loss


def _namespace(below: type[Any], choice: str) -> Namespace:
    return _head(below) if issubclass(own_class(below), nn.Linear) else _model(below)


def _head(below: type[Any]) -> Namespace:
    @wraps(below.forward)
    def forward(self: Any, input: Tensor, loss_options: dict[str, Any] | None = None) -> Tensor:
        if loss_options is None:
            return below.forward(self, input)
        precision = self.precision if isinstance(self, LMHead) else None
        found = lm_head_loss(
            input, self.weight, bias=self.bias, precision=precision, **loss_options
        )
        return found.loss

    return {"forward": forward}


def _model(below: type[Any]) -> Namespace:
    function = innermost(below.forward)
    names = list(inspect.signature(function).parameters)[1:] if function else []

    @wraps(below.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        kept = given.get("logits_to_keep", 0)
        # Who keeps some logits, or evaluates, wants logits.
        if given.get("labels") is None or not self.training or not isinstance(kept, int) or kept:
            return below.forward(self, *args, **kwargs)
        is_dict = given.pop("return_dict", None)
        if is_dict is None:
            is_dict = self.config.return_dict
        seen = without_logits(self, partial(_loss, self.lm_head, softcap_of(self)))
        found = below.forward(seen, **given, return_dict=True)
        output = type(found)(**{name: value for name, value in found.items() if name != "logits"})
        return output if is_dict else output.to_tuple()

    return {"forward": forward}


def softcap_of(model: Any) -> float | None:
    """By what a model caps its logits, in transformers' usual name; None if by nothing."""
    return getattr(model.config, "final_logit_softcapping", None)


def without_logits(model: Any, loss_function: Callable[..., Any], /, **replaced: Any) -> Overlay:
    """The model as its own forward is to see it: logits are hidden states, until the loss.

    Args:
        model: The model.
        loss_function: What is called in the place of its own, with hidden states for logits.
        replaced: Further attributes that are seen otherwise.
    """
    seen: dict[str, Any] = {"lm_head": _LaterHead(model.lm_head), "loss_function": loss_function}
    if softcap_of(model) is not None:
        seen["config"] = Overlay(model.config, final_logit_softcapping=None)
    return Overlay(model, **{**seen, **replaced})


class _LaterHead(Overlay):
    """The head, with its attributes, that gives hidden states back as they are."""

    def __call__(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def _loss(
    head: Any,
    softcap: float | None,
    logits: Tensor,
    labels: Tensor,
    vocab_size: int | None = None,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """What transformers' ForCausalLMLoss gives, from hidden states in the place of logits.

    By way of the head's own call, so that its hooks run, as FSDP2's.
    """
    options: dict[str, Any] = {
        "labels": (labels if shift_labels is None else shift_labels).to(logits.device),
        "shift": shift_labels is None,
        "ignore_index": ignore_index,
        "num_items_in_batch": num_items_in_batch,
        "softcap": softcap,
    }
    return head(logits, loss_options=options)


LOSS = Behaviour(_namespace)
