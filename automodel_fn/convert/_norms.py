"""RMSNorms by backend."""

from __future__ import annotations

from collections.abc import Mapping
from functools import wraps
from typing import Any

from torch import Tensor, nn

from automodel_fn.convert._norm_conventions import norm_convention, normed
from automodel_fn.convert._settings import Behaviour, Namespace, own_class
from automodel_fn.convert._te_state import NO_EXTRA_STATE
from automodel_fn.te._aware import step_aware
from automodel_fn.te._load import load_te_classes


def _namespace(below: type[Any], choice: str) -> Namespace:
    if choice == "te":
        return dict(NO_EXTRA_STATE)
    convention = norm_convention(own_class(below))
    if convention is None:
        raise AssertionError(f"{below.__name__} is no RMSNorm")

    @wraps(below.forward)
    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        return normed(self, hidden_states, convention)

    return {"forward": forward}


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
