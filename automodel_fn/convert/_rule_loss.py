"""Which models can have their loss without logits: the model and its head, both or neither."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from automodel_fn.convert._around import Around
from automodel_fn.convert._logits_trial import scales_logits_only
from automodel_fn.convert._overlay import names_in, uses_super
from automodel_fn.convert._parts import Part
from automodel_fn.convert._rules import Rule, common_refusal
from automodel_fn.nn._lm_head import LMHead

_CAUSAL = "ForCausalLMLoss"


def _model_of(part: Part, around: Around) -> Part | None:
    """The model whose forward makes logits and a loss, of the model itself or of its head."""
    for each in around.above(part):
        if {"lm_head", "loss_function"} <= names_in(each.own):
            head = each.module._modules.get("lm_head")
            return each if part.module in (each.module, head) else None
    return None


def _has_loss(part: Part, around: Around) -> bool:
    return _model_of(part, around) is not None


def _refusal(part: Part, around: Around) -> str:
    model = _model_of(part, around)
    if model is None:
        return "no forward around it makes a loss of it"
    head = model.module._modules.get("lm_head")
    found = [each for each in around.parts if each.module is head]
    if not found:
        return "the model has no lm_head"
    # Who skips the model skips all beneath it.
    pattern = around.skipped.get(id(head))
    if pattern is not None:
        return f"skip={pattern!r}, of the model or of its head: both are needed"
    reasons = (*map(common_refusal, (model, found[0])), _of_head(found[0]), _of_model(model))
    return next(filter(None, reasons), "")


def _of_model(model: Part) -> str:
    module: Any = model.module
    if uses_super(model.own):
        return f"the forward of {model.class_name} asks for super()"
    if not _takes_return_dict(model.own):
        return f"the forward of {model.class_name} takes no return_dict"
    name = getattr(module.loss_function, "__name__", "another one")
    if name != _CAUSAL:
        return f"its loss is {name}, and not {_CAUSAL}"
    if not scales_logits_only(module, model.own):
        return "tried without its body, its forward does more to its logits than to scale them"
    return ""


def _takes_return_dict(cls: type[nn.Module]) -> bool:
    parameters = inspect.signature(cls.forward).parameters
    takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    return takes_any or "return_dict" in parameters


def _of_head(head: Part) -> str:
    if head.own.forward not in (nn.Linear.forward, LMHead.forward):
        return f"its head is a {head.class_name}, and no plain Linear"
    return ""


LOSS_RULE = Rule(
    "loss",
    own="torch",
    is_candidate=_has_loss,
    refusal=_refusal,
    is_listed=True,
    remark=": in training, where labels are given, logits are None",
)
