"""FP8 around forwards: of the model, and of what a recompute runs on its own."""

from __future__ import annotations

from functools import wraps
from typing import Any

from automodel_fn.convert._around import Around
from automodel_fn.convert._experts import unfit_experts
from automodel_fn.convert._parts import Part
from automodel_fn.convert._recipes import config_of
from automodel_fn.convert._rule_linear import unfit_for_fp8
from automodel_fn.convert._rules import Rule
from automodel_fn.convert._settings import Behaviour, Namespace


def _namespace(below: type[Any], choice: str) -> Namespace:
    autocast = config_of(choice).prepared()

    @wraps(below.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with autocast():
            return below.forward(self, *args, **kwargs)

    return {"forward": forward}


def _is_block(part: Part, around: Around) -> bool:
    return id(part.module) in around.fp8_blocks


def _refusal(part: Part, around: Around) -> str:
    """What in it became Transformer Engine's at a time when FP8 was not asked for."""
    beneath = f"{part.names[0]}." if part.names[0] else ""
    for each in around.parts:
        is_within = each is part or each.names[0].startswith(beneath)
        if is_within and (unfit := _unfit(each)):
            return f"{each.names[0]}: {unfit}"
    return ""


def _unfit(part: Part) -> str:
    module: Any = part.module
    if part.settings.get("linear") == "te":
        return unfit_for_fp8(module)
    return unfit_experts(module) if part.settings.get("grouped_experts") == "te" else ""


TE_FP8 = Behaviour(_namespace)
TE_FP8_RULE = Rule(
    "te_fp8",
    own="none",
    is_candidate=_is_block,
    refusal=_refusal,
    remark=", around its forward, so that a recompute of it runs in FP8 too",
)
