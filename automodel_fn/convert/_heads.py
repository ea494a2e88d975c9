"""Heads that make their products in a precision of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from automodel_fn.convert._settings import Behaviour, Namespace
from automodel_fn.nn._lm_head import LMHead


def _namespace(below: type[Any], choice: str) -> Namespace:
    return {}


def _bases(choice: str) -> tuple[type[Any], ...]:
    return (LMHead,)


def _state(module: nn.Module, choice: str) -> Mapping[str, Any]:
    linear: Any = module
    made = LMHead(
        linear.in_features,
        linear.out_features,
        linear.bias is not None,
        "meta",
        linear.weight.dtype,
        precision=choice,  # pyright: ignore[reportArgumentType]
    )
    return vars(made)


HEAD_PRECISION = Behaviour(_namespace, bases=_bases, state=_state)
