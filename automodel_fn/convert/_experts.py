"""Experts of transformers whose products are grouped by another backend than its own.

Their forward stands in the place of the one that asks transformers' registry, which stays as it is,
and so does their config. It adds up in float32 and in one order, forward and backward, and rounds
once, where transformers' rounds each weighted row and leaves the backward to `index_put`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from automodel_fn.convert._around import Around
from automodel_fn.convert._head_sizes import stored_dtype
from automodel_fn.convert._parts import Part, is_experts
from automodel_fn.convert._rule_linear import no_multiple
from automodel_fn.convert._rules import Rule
from automodel_fn.convert._settings import Behaviour, Namespace
from automodel_fn.ops._experts import (
    PRODUCT,
    GroupedGemm,
    Product,
    Stacked,
    TorchMM,
    load_gmm,
    through_experts,
)
from automodel_fn.te._grouped import GroupedLinears
from automodel_fn.te._load import load_te_classes

_PRODUCTS: Mapping[str, Callable[[], Product]] = {
    "torch_mm": TorchMM,
    "te": GroupedLinears,
    "gmm": GroupedGemm,
}
_NEEDED: Mapping[str, Callable[[], Any]] = {"te": load_te_classes, "gmm": load_gmm}
GROUPED = tuple(_PRODUCTS)
"""The choices of `experts` that are grouped here."""


def grouped_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """What transformers' forwards compute, called as they are.

    Args:
        self: The module.
        hidden_states: `[T, H]`.
        top_k_index: `[T, K]`: the experts of each token.
        top_k_weights: `[T, K]`.

    Returns:
        `[T, H]`, in the dtype of `hidden_states`.
    """
    return through_experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        product=vars(self)[PRODUCT],
        layers=(_stacked(self, _first(self)), _stacked(self, "down_proj")),
        gate=self._apply_gate if self.has_gate else self.act_fn,
        norm=self.post_expert_norm if getattr(self, "has_post_expert_norm", False) else None,
    )


def _first(experts: Any) -> str:
    return "gate_up_proj" if experts.has_gate else "up_proj"


def _stacked(experts: Any, name: str) -> Stacked:
    return Stacked(
        getattr(experts, name),
        name=name,
        bias=getattr(experts, f"{name}_bias") if experts.has_bias else None,
        is_transposed=experts.is_transposed,
    )


def _namespace(below: type[Any], choice: str) -> Namespace:
    return {"forward": grouped_forward}


def _state(module: nn.Module, choice: str) -> Mapping[str, Any]:
    _NEEDED.get(choice, bool)()
    return {PRODUCT: _PRODUCTS[choice]()}


def _is_candidate(part: Part, around: Around) -> bool:
    return is_experts(part)


def _refusal(part: Part, around: Around) -> str:
    experts: Any = part.module
    if getattr(experts, "_is_expert_parallel", False):
        return "it has a part of the experts only, and gets no tokens for the others"
    names = _first(experts), "down_proj"
    stacked = [getattr(experts, name, None) for name in names]
    if not all(isinstance(weight, Tensor) and weight.dim() == 3 for weight in stacked):
        return f"its {' and '.join(names)} are no stacked weights"
    return ""


def _unfit(part: Part, around: Around) -> str:
    if around.asked[GROUPED_EXPERTS_RULE.field] != "te":
        return ""
    if stored_dtype(part.module) == torch.float64:
        return "its weights are stored in float64"
    return unfit_experts(part.module) if around.asked["te_fp8"] != "none" else ""


def unfit_experts(experts: nn.Module) -> str:
    """Which size of experts is none that FP8 can have; "" if all are."""
    for name in (_first(experts), "down_proj"):
        weight: Tensor = getattr(experts, name)
        for size in weight.shape[1:]:
            if unfit := no_multiple(f"a size of {name}", size):
                return unfit
    return ""


GROUPED_EXPERTS = Behaviour(_namespace, state=_state)
GROUPED_EXPERTS_RULE = Rule(
    "grouped_experts",
    own="none",
    is_candidate=_is_candidate,
    refusal=_refusal,
    unfit=_unfit,
    instead="say experts='auto', store the weights in fp32, fp16 or bf16, or leave FP8 off "
    "(te_fp8=None)",
    remark=", in the place of transformers' own forward",
)
