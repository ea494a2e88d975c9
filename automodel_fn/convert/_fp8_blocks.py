"""FP8 around forwards: of the model, and of what a recompute runs on its own."""

from __future__ import annotations

from functools import wraps
from typing import Any

from automodel_fn.convert._around import Around
from automodel_fn.convert._experts import GROUPED_EXPERTS_RULE, unfit_experts
from automodel_fn.convert._parts import Part
from automodel_fn.convert._recipes import config_of
from automodel_fn.convert._rule_linear import LINEAR_RULE, unfit_for_fp8
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
    return part is around.parts[0] or id(part.module) in around.fp8_blocks


def _within(part: Part, around: Around) -> list[Part]:
    beneath = f"{part.names[0]}." if part.names[0] else ""
    return [each for each in around.parts if each is part or each.names[0].startswith(beneath)]


def _refusal(part: Part, around: Around) -> str:
    """What in it would become Transformer Engine's, were it not in `skip`."""
    left = next((each for each in _within(part, around) if id(each.module) in around.skipped), None)
    if left is None or _layers(part, around)[0]:
        return ""
    return f"no layer in it becomes Transformer Engine's: skip={around.skipped[id(left.module)]!r}"


def _unfit(part: Part, around: Around) -> str:
    """What in it became Transformer Engine's when FP8 was not asked for, or that nothing does."""
    for each in _within(part, around):
        if unfit := _unfit_layer(each):
            return f"{each.names[0]}: {unfit}"
    found, why = _layers(part, around)
    return "" if found else f"no layer in it is Transformer Engine's, or becomes it{why}"


def _layers(part: Part, around: Around) -> tuple[bool, str]:
    """Whether FP8 has a layer to act on, and of the first that it could have, why not."""
    why = ""
    for each in _within(part, around):
        for rule in (LINEAR_RULE, GROUPED_EXPERTS_RULE):
            entry = rule.entry(each, around) if rule.field in around.asked else None
            if entry is not None and entry.after == "te":
                return True, ""
            if entry is not None and around.asked[rule.field] == "te":
                why = why or f" ({entry.label}: {entry.reason})"
    return False, why


def _unfit_layer(part: Part) -> str:
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
    unfit=_unfit,
    instead="say linear='te' or experts='te' where their sizes fit, or te_fp8=None",
    remark=", around its forward, so that a recompute of it runs in FP8 too",
)
