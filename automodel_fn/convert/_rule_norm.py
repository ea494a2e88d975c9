"""Which modules are RMSNorms, and which of them can run by another backend."""

from __future__ import annotations

from typing import Any

from automodel_fn.convert._around import Around
from automodel_fn.convert._norm_conventions import norm_convention
from automodel_fn.convert._parts import Part
from automodel_fn.convert._rules import Rule
from automodel_fn.nn._rms_norm import Float32RMSNorm


def _is_norm(part: Part, around: Around) -> bool:
    module = part.module
    if module._modules or isinstance(module, Float32RMSNorm):
        return False
    return "rmsnorm" in part.class_name.lower() or _is_shaped_as_one(part)


def _is_shaped_as_one(part: Part) -> bool:
    named: dict[str, Any] = dict(part.module._parameters)
    if set(named) != {"weight"} or named["weight"] is None or named["weight"].dim() != 1:
        return False
    return not part.module._buffers and norm_convention(part.own) is not None


def _refusal(part: Part, around: Around) -> str:
    convention = norm_convention(part.own)
    if convention is None:
        return "tried on a few values, its forward is none of the RMSNorms that are known here"
    weight: Any = part.module._parameters.get("weight")
    if weight is None:
        return "it has no parameter named weight"
    return ""


RMS_NORM_RULE = Rule(
    "rms_norm", own="torch", is_candidate=_is_norm, refusal=_refusal, is_listed=True
)
