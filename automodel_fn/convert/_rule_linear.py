"""Which linear layers can be Transformer Engine's."""

from __future__ import annotations

from typing import Any

from torch import nn

from automodel_fn.convert._around import Around
from automodel_fn.convert._parts import Part
from automodel_fn.convert._rules import Rule

_MULTIPLE = 16


def _is_linear(part: Part, around: Around) -> bool:
    return issubclass(part.own, nn.Linear)


def _refusal(part: Part, around: Around) -> str:
    module: Any = part.module
    if part.own.forward is not nn.Linear.forward:
        return f"{part.class_name} has a forward of its own"
    if "parametrizations" in module._modules:
        return "its parameters are parametrized"
    return ""


def _unfit(part: Part, around: Around) -> str:
    module: Any = part.module
    weight = module.weight
    if not weight.is_floating_point() or weight.dtype.itemsize not in (2, 4):
        return f"its weight is stored in {str(weight.dtype).removeprefix('torch.')}"
    return unfit_for_fp8(module) if around.asked["te_fp8"] != "none" else ""


def unfit_for_fp8(linear: nn.Linear) -> str:
    """Which size of a layer is none that FP8 can have; "" if both are.

    Example:
        >>> unfit_for_fp8(nn.Linear(32, 20)), unfit_for_fp8(nn.Linear(32, 16))
        ('out_features=20 is no multiple of 16, as FP8 needs', '')
    """
    for name in ("in_features", "out_features"):
        if unfit := no_multiple(name, getattr(linear, name)):
            return unfit
    return ""


def no_multiple(name: str, size: int) -> str:
    """That a size is none that FP8 can have; "" if it is.

    Example:
        >>> no_multiple("in_features", 20), no_multiple("in_features", 32)
        ('in_features=20 is no multiple of 16, as FP8 needs', '')
    """
    return f"{name}={size} is no multiple of {_MULTIPLE}, as FP8 needs" if size % _MULTIPLE else ""


def _keeping(part: Part, around: Around) -> str:
    if part.module is around.head:
        return "the head: its product is that of the logits or of the loss"
    own = {f"{name}.weight" if name else "weight" for name in part.names}
    weight: Any = part.module._parameters.get("weight")
    others = [name for name in around.names_of.get(id(weight), ()) if name not in own]
    return f"its weight is tied to {others[0]}" if others else ""


LINEAR_RULE = Rule(
    "linear",
    own="torch",
    is_candidate=_is_linear,
    refusal=_refusal,
    unfit=_unfit,
    instead="say linear='torch', store the weights in fp32, fp16 or bf16, or leave FP8 off "
    "(te_fp8=None)",
    keeping=_keeping,
    is_listed=True,
)
