"""How a family's function turns queries and keys: found by trying it, on a few values."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, Literal

import attrs
import torch
from torch import Tensor

from automodel_fn.convert._overlay import is_close, probe_tensor
from automodel_fn.ops._apply_rope import apply_rope

Form = Literal["pair", "positions", "single", "rows", "complex"]
Tables = Literal["halves", "half", "neighbours"]
_FORMS: dict[tuple[str, ...], Form] = {
    ("q", "k", "cos", "sin", "unsqueeze_dim"): "pair",
    ("q", "k", "cos", "sin", "position_ids", "unsqueeze_dim"): "positions",
    ("x", "cos", "sin", "unsqueeze_dim"): "single",
    ("q", "k", "cos", "sin"): "rows",
    ("xq", "xk", "freqs_cis"): "complex",
}
# The shape of heads, where the heads are in it, and the shape of tables but for their width.
_HEADS_FIRST = ((2, 3, 5, 8), 1, (2, 5))
_TOKENS_FIRST = ((2, 5, 3, 8), 2, (2, 5))
_PACKED = ((5, 3, 8), 1, (5,))


@attrs.frozen
class RotaryConvention:
    """Which values a family turns together, how its tables lie, and what its function takes.

    In which order it gives them is no part of it, as long as it is one for queries and keys.

    Args:
        form: "pair" (queries and keys, and where their heads are), "positions" (with position ids
            before that), "single" (one of the two), "rows" (heads after tokens), or "complex"
            (cosines and sines are one table of complex numbers).
        interleaved: Whether a pair is two neighbours.
        tables: "half" (each angle once), "halves" (all of them, then all again), or "neighbours"
            (each twice at once).
        is_backward: Whether it turns the other way round (NanoChat).
        heads: The dimension of heads, in the form "complex".
    """

    form: Form
    interleaved: bool = attrs.field(kw_only=True)
    tables: Tables = attrs.field(kw_only=True)
    is_backward: bool = attrs.field(default=False, kw_only=True)
    heads: int = attrs.field(default=1, kw_only=True)


def fused(convention: RotaryConvention) -> Callable[..., Any]:
    """What stands in for a family's function on queries and keys.

    Args:
        convention: How the family does it.
    """
    times = 2 if convention.tables == "half" else 1
    step = 2 if convention.tables == "neighbours" else 1

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, heads: int) -> Any:
        layout = "thd" if q.dim() == 3 else "bhsd" if _from_right(cos, heads) == 3 else "bshd"
        rotary_dim = times * cos.shape[-1]
        if step > 1:
            cos, sin = cos[..., ::step], sin[..., ::step]
        if convention.is_backward:
            sin = -sin
        return apply_rope(
            q, k, cos, sin, layout=layout, rotary_dim=rotary_dim, interleaved=convention.interleaved
        )

    return _in_form(convention, turned)


def _in_form(convention: RotaryConvention, turned: Callable[..., Any]) -> Callable[..., Any]:
    """The rotation with the parameters of the family's function."""

    def pair(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Any:
        return turned(q, k, cos, sin, unsqueeze_dim)

    def positions(
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        position_ids: Any = None,
        unsqueeze_dim: int = 1,
    ) -> Any:
        return turned(q, k, cos, sin, unsqueeze_dim)

    def single(x: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> Tensor:
        nothing = x.detach().narrow(-_from_right(cos, unsqueeze_dim), 0, 0)
        return turned(x, nothing, cos, sin, unsqueeze_dim)[0]

    def rows(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> Any:
        return turned(q, k, cos, sin, -2)

    def of_complex(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> Any:
        return turned(xq, xk, freqs_cis.real, freqs_cis.imag, convention.heads)

    made = {
        "pair": pair,
        "positions": positions,
        "single": single,
        "rows": rows,
        "complex": of_complex,
    }
    return made[convention.form]


def _from_right(table: Tensor, heads: int) -> int:
    """Which dimension heads are, from the right: where `table.unsqueeze(heads)` has it.

    Pixtral's tables are `[S, D]` and have it at 0, which is the 1 of tables `[B, S, D]`.
    """
    return table.dim() + 1 - heads if heads >= 0 else -heads


@functools.cache
def rotary_convention(function: Any) -> RotaryConvention | None:
    """How a family's function turns queries and keys, found by trying it; None if another way.

    Args:
        function: `apply_rotary_pos_emb` of a family, or the like.
    """
    try:
        form = _FORMS.get(tuple(inspect.signature(function).parameters))
    except ValueError:
        return None  # it is none of Python's
    ways = _ways(form) if form else ()
    way = next((way for way in ways if _is_of_way(function, way)), None)
    return None if way is None or _takes_queries_alone(function, way) else way


def _ways(form: Form) -> Iterator[RotaryConvention]:
    if form == "complex":
        for heads in (1, 2):
            yield RotaryConvention(form, interleaved=True, tables="half", heads=heads)
        return
    every_table: tuple[Tables, ...] = ("halves", "half", "neighbours")
    for is_backward, interleaved, tables in product((False, True), (False, True), every_table):
        yield RotaryConvention(
            form, interleaved=interleaved, tables=tables, is_backward=is_backward
        )


def _is_of_way(function: Any, convention: RotaryConvention) -> bool:
    """Whether the whole head fits, in each layout, and half of it where the function takes that."""
    cases = {
        "rows": (_PACKED, _TOKENS_FIRST),
        "complex": (_HEADS_FIRST if convention.heads == 1 else _TOKENS_FIRST,),
    }.get(convention.form, (_HEADS_FIRST, _TOKENS_FIRST))
    fits = [_fits(function, convention, case, 4) for case in cases]
    # A function may take one of the layouts, or no table of half the width: it then raises.
    rest = (_fits(function, convention, case, 2) for case in cases)
    needed = fits[:1] if convention.form == "rows" else fits
    return all(needed) and False not in fits and False not in rest


def _takes_queries_alone(function: Any, convention: RotaryConvention) -> bool:
    """Whether None may stand for the keys (Mistral Large 4), which have no stand-in here."""
    if convention.form not in ("pair", "positions"):
        return False
    shape, heads, of_table = _HEADS_FIRST
    angles = probe_tensor(*of_table, 4, seed=2)
    given = [probe_tensor(*shape), None]
    return _tried(function, convention, given, angles, {"unsqueeze_dim": heads}) is not None


def _fits(function: Any, convention: RotaryConvention, case: Any, num_angles: int) -> bool | None:
    """Whether a function gives what is expected; None if it cannot take the values."""
    shape, heads, of_table = case
    heads_of = [probe_tensor(*shape), probe_tensor(*shape, seed=1)]
    angles = probe_tensor(*of_table, num_angles, seed=2)
    given = heads_of[:1] if convention.form == "single" else heads_of
    named = {"unsqueeze_dim": heads} if convention.form not in ("rows", "complex") else {}
    found = _tried(function, convention, given, angles, named)
    if found is None:
        return None
    expected = _listed(fused(convention)(*given, *_tables(convention, angles), **named))
    narrow = _tried(function, convention, [each.bfloat16() for each in given], angles, named)
    if narrow is None or any(each.dtype != torch.bfloat16 for each in narrow):
        return False
    return _are_close(found, expected, convention)


def _tried(
    function: Any,
    convention: RotaryConvention,
    given: list[Any],
    angles: Tensor,
    named: dict[str, int],
) -> list[Any] | None:
    tables = _tables(convention, angles)
    if convention.form != "complex":
        tables = [each.to(given[0].dtype) for each in tables]
    try:
        with torch.no_grad(), torch.device("cpu"):
            return _listed(function(*given, *tables, **named))
    except (AttributeError, TypeError, RuntimeError, ValueError, LookupError):
        return None


def _listed(found: Any) -> list[Any]:
    return [found] if isinstance(found, Tensor) else list(found)


def _tables(convention: RotaryConvention, angles: Tensor) -> list[Tensor]:
    if convention.form == "complex":
        return [torch.polar(torch.ones_like(angles), angles)]
    if convention.tables == "halves":
        angles = torch.cat((angles, angles), -1)
    elif convention.tables == "neighbours":
        angles = angles.repeat_interleave(2, -1)
    return [angles.cos(), angles.sin()]


def _are_close(found: list[Any], expected: list[Any], convention: RotaryConvention) -> bool:
    if len(found) != len(expected):
        return False
    if convention.form == "complex":
        # Products of complex numbers are added before they are rounded.
        return all(map(torch.allclose, found, expected))
    if all(map(is_close, found, expected)):
        return True
    # A family may give the values in another order: products of queries and keys are the same.
    ordered = [torch.cat((each[..., ::2], each[..., 1::2]), -1) for each in expected]
    may_reorder = convention.interleaved and len(found) == 2
    return may_reorder and all(map(is_close, found, ordered))
