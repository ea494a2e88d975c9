"""Which modules are RMSNorms, and which of them can run by another backend."""

from __future__ import annotations

from typing import Any

from torch import nn

from automodel_fn.convert._around import Around
from automodel_fn.convert._gated_norms import gated_convention, is_norm_first, other_activation
from automodel_fn.convert._norm_conventions import EPS_NAMES, has_weight, norm_convention
from automodel_fn.convert._parts import Part
from automodel_fn.convert._rules import Rule
from automodel_fn.dtypes import dtype_name
from automodel_fn.nn._rms_norm import Float32RMSNorm


def _is_norm(part: Part, around: Around) -> bool:
    module = part.module
    if module._modules or isinstance(module, Float32RMSNorm):
        return False
    return "rmsnorm" in part.class_name.lower() or _is_shaped_as_one(part)


def _is_shaped_as_one(part: Part) -> bool:
    """Whether it has a weight at most, and computes what a norm does, whatever its name."""
    module, named = part.module, dict[str, Any](part.module._parameters)
    if module._buffers or not any(name in vars(module) for name in EPS_NAMES):
        return False
    if any(
        name != "weight" or (each is not None and each.dim() != 1) for name, each in named.items()
    ):
        return False
    return norm_convention(part.own, has_weight(module)) is not None


def _refusal(part: Part, around: Around) -> str:
    module: Any = part.module
    convention = norm_convention(part.own, has_weight(module))
    if convention is None and norm_convention(part.own) is not None:
        return "it has no parameter named weight"
    if convention is None:
        return _gated_refusal(part, around)
    # A dummy, as Falcon Mamba has, is none.
    is_weighted = has_weight(module) and convention.multiply != "none"
    if is_weighted and module._parameters.get("weight") is None:
        return "it has no parameter named weight"
    if getattr(module, "group_size", None) is not None:
        return f"it norms groups of {module.group_size}"
    if isinstance(module, nn.RMSNorm):
        if len(module.normalized_shape) != 1:
            return f"it norms over {len(module.normalized_shape)} dimensions"
        if module.eps is None:
            return "its eps is None: another one for each dtype"
    return _te_refusal(module, is_weighted) if around.asked["rms_norm"] == "te" else ""


def _unfit(part: Part, around: Around) -> str:
    weight = part.module._parameters.get("weight")
    if around.asked["rms_norm"] != "te" or weight is None or weight.dtype.itemsize <= 4:
        return ""
    return f"its weight is stored in {dtype_name(weight.dtype)}"


def _gated_refusal(part: Part, around: Around) -> str:
    if gated_convention(part.own, is_norm_first(part.module)) is None:
        return "tried on a few values, its forward is none of the RMSNorms that are known here"
    if around.asked["rms_norm"] == "te":
        return "Transformer Engine has no RMSNorm with a gate"
    activation = other_activation(part.module)
    return (
        f"its gate goes through {activation}, and neither through silu nor sigmoid"
        if activation
        else ""
    )


def _te_refusal(module: Any, is_weighted: bool) -> str:
    if not is_weighted:
        return "Transformer Engine has no RMSNorm without a weight"
    if isinstance(module, nn.RMSNorm):
        return "it is PyTorch's own; build.rms_norm(..., backend='te') makes one that is not"
    return ""


RMS_NORM_RULE = Rule(
    "rms_norm",
    own="torch",
    is_candidate=_is_norm,
    refusal=_refusal,
    unfit=_unfit,
    instead="say rms_norm='torch_fp32', or cast the model",
    is_listed=True,
)
