"""Which modules are routers of experts, and what they can be told."""

from __future__ import annotations

from automodel_fn.convert._around import Around
from automodel_fn.convert._overlay import names_in
from automodel_fn.convert._parts import Part
from automodel_fn.convert._rules import Rule


def _is_router(part: Part, around: Around) -> bool:
    has = vars(part.module)
    return (
        part.class_name.endswith("Router")
        and "weight" in part.module._parameters
        and {"top_k", "num_experts"} <= has.keys()
        and "topk" in names_in(part.own)
    )


def _keeping(part: Part, around: Around) -> str:
    if around.asked["fake_balanced_gate"] != "False":
        return "the fake gate takes the place of the router"
    is_wide = {"type", "float32"} <= names_in(part.own)
    is_asked = around.asked["gate_precision"] == "float32"
    return "its own code projects in float32" if is_wide and is_asked else ""


def _refusal(part: Part, around: Around) -> str:
    if {"type", "float32"} <= names_in(part.own):
        return "its own code projects in float32, whatever it is given"
    return ""


GATE_PRECISION_RULE = Rule(
    "gate_precision",
    own="none",
    is_candidate=_is_router,
    refusal=_refusal,
    keeping=_keeping,
    remark=": it projects in that dtype; its scores are what its own code makes of that",
)
FAKE_GATE_RULE = Rule("fake_balanced_gate", own="False", is_candidate=_is_router)
