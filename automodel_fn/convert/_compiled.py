"""Attention modules whose forward is compiled as a whole."""

from __future__ import annotations

import types
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from automodel_fn.convert._around import Around
from automodel_fn.convert._overlay import names_in
from automodel_fn.convert._parts import Part
from automodel_fn.convert._rules import Rule
from automodel_fn.convert._settings import Behaviour, Namespace

_CACHES = ("cache", "past_key_values")


def _namespace(below: type[Any], choice: str) -> Namespace:
    compiled: dict[Any, Callable[..., Any]] = {}

    @wraps(below.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return below.forward(self, *args, **kwargs)
        # A cache is asked for its layer by number, so that each layer has a graph of its own.
        has_cache = any(kwargs.get(name) is not None for name in _CACHES)
        layer = getattr(self, "layer_idx", None) if has_cache else None
        if layer not in compiled:
            compiled[layer] = torch.compile(_copied(below.forward))
        return compiled[layer](self, *args, **kwargs)

    return {"forward": forward}


def _copied(function: types.FunctionType) -> types.FunctionType:
    """The function with code of its own: graphs are counted by code, and those of 8 are all."""
    copied = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def is_attention(part: Part, around: Around) -> bool:
    """Whether a module asks transformers for its attention function."""
    return "ALL_ATTENTION_FUNCTIONS" in names_in(part.own)


COMPILE_ATTN = Behaviour(_namespace)
COMPILE_ATTN_RULE = Rule("compile_attn", own="False", is_candidate=is_attention)
