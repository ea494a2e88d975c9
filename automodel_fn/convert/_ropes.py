"""Attention modules whose rotary embeddings are one operation."""

from __future__ import annotations

from typing import Any

from automodel_fn.convert._around import Around
from automodel_fn.convert._overlay import innermost, names_in, with_globals
from automodel_fn.convert._parts import Part
from automodel_fn.convert._rotary_conventions import fused, rotary_convention
from automodel_fn.convert._rules import Rule
from automodel_fn.convert._settings import Behaviour, Namespace

_FUNCTIONS = (
    "apply_rotary_pos_emb",
    "apply_rotary_pos_emb_interleave",
    "apply_rotary_pos_emb_vision",
    "apply_rotary_emb",
)


def _functions(cls: type[Any]) -> dict[str, Any]:
    """The functions for rotary embeddings that the forward of a class names, by name."""
    function = innermost(cls.forward)
    known = function.__globals__ if function else {}
    return {name: known[name] for name in _FUNCTIONS if name in names_in(cls) and name in known}


def _namespace(below: type[Any], choice: str) -> Namespace:
    conventions = {name: rotary_convention(each) for name, each in _functions(below).items()}
    replaced = {name: fused(each) for name, each in conventions.items() if each is not None}
    return {"forward": with_globals(below.forward, replaced)}


def _rotates(part: Part, around: Around) -> bool:
    return bool(_functions(part.own))


def _refusal(part: Part, around: Around) -> str:
    for name, function in _functions(part.own).items():
        if rotary_convention(function) is None:
            return f"tried on a few values, its {name} turns another way"
    return ""


ROPE = Behaviour(_namespace)
ROPE_RULE = Rule(
    "rope_fusion", own="False", is_candidate=_rotates, refusal=_refusal, is_listed=True
)
