"""Which heads can make their products in a precision of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from automodel_fn.convert._around import Around
from automodel_fn.convert._parts import Part
from automodel_fn.convert._rules import Rule
from automodel_fn.dtypes import dtype_name
from automodel_fn.nn._lm_head import LMHead
from automodel_fn.ops._heads import NARROW_DTYPES, fsdp_policy
from automodel_fn.ops._split import num_parts_of


def _is_head(part: Part, around: Around) -> bool:
    return part.module is around.head


def _keeping(part: Part, around: Around) -> str:
    own = _made_for(part)
    return f"it is an LMHead that was made for {own}" if own == _asked(around) else ""


def _refusal(part: Part, around: Around) -> str:
    own = _made_for(part)
    if own:
        return f"it is an LMHead that was made for {own}; make it with precision={_asked(around)!r}"
    if part.own.forward is not nn.Linear.forward:
        return f"it is a {part.class_name}, and no plain Linear"
    stored: Any = part.module.weight
    return _narrowed(part, around, stored.dtype)


def _unfit(part: Part, around: Around) -> str:
    weight: Any = part.module.weight
    if num_parts_of(weight.dtype) is None:
        return f"its weight is stored in {dtype_name(weight.dtype)}, and not in fp32, fp16 or bf16"
    return ""


def _made_for(part: Part) -> str:
    """The precision of a head that is an LMHead of itself, or ""."""
    module: Any = part.module
    return module.precision if issubclass(part.own, LMHead) else ""


def _asked(around: Around) -> str:
    return around.asked["lm_head_precision"]


def _narrowed(part: Part, around: Around, stored: torch.dtype) -> str:
    """What FSDP2 takes from the weight before the product, or from the logits after it."""
    policies = (fsdp_policy(each.module) for each in around.above(part) if _is_sharded(each))
    policy = next(policies, None)
    if policy is None:
        return ""
    loses_bits = policy.param_dtype in NARROW_DTYPES and policy.param_dtype != stored
    if (loses_bits and _asked(around) != "bf16") or policy.output_dtype in NARROW_DTYPES:
        return (
            f"FSDP2 rounds its weight or its logits ({policy}); shard it by itself: "
            "fully_shard(lm_head, mp_policy=MixedPrecisionPolicy())"
        )
    return ""


def _is_sharded(part: Part) -> bool:
    return isinstance(part.module, FSDPModule)


HEAD_RULE = Rule(
    "lm_head_precision",
    own="none",
    is_candidate=_is_head,
    refusal=_refusal,
    unfit=_unfit,
    instead="say lm_head_precision=None, or cast the head",
    keeping=_keeping,
    remark=": its logits are float32; all but fp32 takes bf16 hidden states",
)
