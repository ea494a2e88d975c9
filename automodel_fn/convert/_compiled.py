"""Attention modules whose forward is compiled as a whole."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch

from automodel_fn.convert._around import Around
from automodel_fn.convert._overlay import names_in
from automodel_fn.convert._parts import Part
from automodel_fn.convert._rules import Rule
from automodel_fn.convert._settings import Behaviour, Namespace


def _namespace(below: type[Any], choice: str) -> Namespace:
    compiled = torch.compile(below.forward)

    @wraps(below.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return compiled(self, *args, **kwargs)

    return {"forward": forward}


def is_attention(part: Part, around: Around) -> bool:
    """Whether a module asks transformers for its attention function."""
    return "ALL_ATTENTION_FUNCTIONS" in names_in(part.own)


COMPILE_ATTN = Behaviour(_namespace)
COMPILE_ATTN_RULE = Rule("compile_attn", own="False", is_candidate=is_attention)
