"""Attention modules whose rotary embeddings are one operation."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import Tensor

from automodel_fn.convert._around import Around
from automodel_fn.convert._overlay import innermost, is_close, names_in, probe_tensor, with_globals
from automodel_fn.convert._parts import Part
from automodel_fn.convert._rules import Rule
from automodel_fn.convert._settings import Behaviour, Namespace
from automodel_fn.ops._apply_rope import apply_rope

_FUNCTIONS = ("apply_rotary_pos_emb", "apply_rotary_pos_emb_interleave")
_PARAMETERS = (
    ["q", "k", "cos", "sin", "unsqueeze_dim"],
    ["q", "k", "cos", "sin", "position_ids", "unsqueeze_dim"],
)


@attrs.frozen
class RotaryConvention:
    """Which values a family turns together, and how its tables lie.

    In which order it gives them is no part of it, as long as it is one for queries and keys.

    Args:
        interleaved: Whether a pair is two neighbours.
        is_half: Whether tables have each angle once.
        takes_positions: Whether the function has position ids before `unsqueeze_dim`.
    """

    interleaved: bool
    is_half: bool = attrs.field(kw_only=True)
    takes_positions: bool = attrs.field(kw_only=True)


def fused(convention: RotaryConvention) -> Callable[..., tuple[Tensor, Tensor]]:
    """What stands in for a family's function on queries and keys.

    Args:
        convention: How the family does it.
    """
    times = 2 if convention.is_half else 1

    def rotated(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
    ) -> tuple[Tensor, Tensor]:
        return apply_rope(
            q,
            k,
            cos,
            sin,
            layout="bhsd" if unsqueeze_dim == 1 else "bshd",
            rotary_dim=times * cos.shape[-1],
            interleaved=convention.interleaved,
        )

    def with_positions(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Any = None,
        unsqueeze_dim: int = 1,
    ) -> tuple[Tensor, Tensor]:
        return rotated(q, k, cos, sin, unsqueeze_dim)

    return with_positions if convention.takes_positions else rotated


@functools.cache
def rotary_convention(function: Any) -> RotaryConvention | None:
    """How a family's function turns queries and keys, found by trying it; None if another way.

    Args:
        function: `apply_rotary_pos_emb` of a family, or the like.
    """
    parameters = list(inspect.signature(function).parameters)
    if parameters not in _PARAMETERS:
        return None
    for interleaved in (False, True):
        for is_half in (False, True):
            convention = RotaryConvention(
                interleaved, is_half=is_half, takes_positions="position_ids" in parameters
            )
            if all(_fits(function, convention, dim) for dim in (1, 2)):
                return convention
    return None


def _fits(function: Any, convention: RotaryConvention, unsqueeze_dim: int) -> bool:
    heads = (2, 3, 5, 8) if unsqueeze_dim == 1 else (2, 5, 3, 8)
    q, k = probe_tensor(*heads), probe_tensor(*heads, seed=1)
    angles = probe_tensor(2, 5, 4, seed=2)
    if not convention.is_half:
        angles = torch.cat((angles, angles), -1)
    given: dict[str, Any] = {"unsqueeze_dim": unsqueeze_dim}
    try:
        with torch.no_grad(), torch.device("cpu"):
            found = function(q, k, angles.cos(), angles.sin(), **given)
    except (AttributeError, TypeError, RuntimeError, ValueError, LookupError):
        return False
    expected = fused(convention)(q, k, angles.cos(), angles.sin(), **given)
    if convention.interleaved and not all(map(is_close, found, expected)):
        # A family may give the values in another order: products of queries and keys are the same.
        expected = [torch.cat((each[..., ::2], each[..., 1::2]), -1) for each in expected]
    return all(map(is_close, found, expected))


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
