"""Linear layers by backend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from automodel_fn.convert._settings import Behaviour, Namespace
from automodel_fn.convert._te_state import NO_EXTRA_STATE
from automodel_fn.te._aware import step_aware
from automodel_fn.te._load import load_te_classes


def _namespace(below: type[Any], choice: str) -> Namespace:
    return dict(NO_EXTRA_STATE)


def _bases(choice: str) -> tuple[type[Any], ...]:
    return (step_aware(load_te_classes().linear, "linear"),)


def _state(module: nn.Module, choice: str) -> Mapping[str, Any]:
    linear: Any = module
    made = _bases(choice)[0](
        in_features=linear.in_features,
        out_features=linear.out_features,
        bias=linear.bias is not None,
        device="meta",
        params_dtype=linear.weight.dtype,
    )
    return vars(made)


LINEAR = Behaviour(_namespace, bases=_bases, state=_state)
