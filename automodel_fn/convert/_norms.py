"""RMSNorms by backend."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from torch import Tensor, nn

from automodel_fn.convert._gated_norms import gated, gated_convention, is_norm_first
from automodel_fn.convert._norm_conventions import has_weight, norm_convention, normed
from automodel_fn.convert._settings import Behaviour, Namespace, own_class
from automodel_fn.convert._te_state import NO_EXTRA_STATE
from automodel_fn.te._aware import step_aware
from automodel_fn.te._load import load_te_classes


def _namespace(below: type[Any], choice: str) -> Namespace:
    if choice == "te":
        return dict(NO_EXTRA_STATE)
    own = own_class(below)
    plain = {is_weighted: norm_convention(own, is_weighted) for is_weighted in (True, False)}
    if any(plain.values()):
        return {"forward": _plain(below, plain)}
    return {
        "forward": _gated(below, {first: gated_convention(own, first) for first in (True, False)})
    }


def _plain(below: type[Any], conventions: Mapping[bool, Any]) -> Any:
    @wraps(below.forward)
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return normed(self, hidden_states, conventions[has_weight(self)])

    return forward


def _gated(below: type[Any], conventions: Mapping[bool, Any]) -> Any:
    @wraps(below.forward)
    def forward(self: Any, hidden_states: Tensor, gate: Tensor | None = None) -> Tensor:
        return gated(self, hidden_states, gate, conventions[is_norm_first(self)])

    return forward


def _bases(choice: str) -> tuple[type[Any], ...]:
    return (step_aware(load_te_classes().rms_norm, "rms_norm"),) if choice == "te" else ()


def _state(module: nn.Module, choice: str) -> Mapping[str, Any]:
    convention = norm_convention(own_class(type(module)))
    if choice != "te" or convention is None:
        return {}
    weight: Any = module.weight
    options = {"zero_centered_gamma": True} if convention.offset else {}
    made = _bases(choice)[0](
        normalized_shape=weight.shape[0],
        eps=getattr(module, convention.eps_name),
        device="meta",
        dtype=weight.dtype,
        **options,
    )
    return vars(made)


RMS_NORM = Behaviour(_namespace, bases=_bases, state=_state)
