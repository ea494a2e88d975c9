"""Laws of rotary embeddings: each pair is turned by the angle of its position, and no further."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from automodel_fn.ops._apply_rope import apply_rope
from automodel_fn.ops._rope import RopeConfig
from automodel_fn.ops._rope_tables import rope_tables
from automodel_fn.testing._facts import demand, fact_of, wrong_elements
from automodel_fn.testing._laws_ops import demand_between

_TOKEN = {"bshd": 1, "bhsd": 2, "thd": 0}


def check_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | int = 0,
    layout: Literal["bshd", "bhsd", "thd"] = "bshd",
    interleaved: bool = False,
) -> None:
    """Law: `apply_rope` multiplies complex numbers, off by its roundings only, in every layout.

    Asked for is a complex product in complex128 of every pair, rounded as three operations in
    float32 allow; that the rest of a head keeps its bits; that the gradient is the product with the
    conjugate; that neither gradients nor the order of dimensions change a bit of the result, each
    token packed on its own included; and that nothing that was given is changed.

    Args:
        q: As for `apply_rope`, with values whose sums do not overflow.
        k: As for `apply_rope`.
        cos: As for `apply_rope`, float32.
        sin: As for `apply_rope`, float32.
        position_ids: As for `apply_rope`.
        layout: "bshd", "bhsd" or "thd".
        interleaved: As for `apply_rope`.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> tables, x = rope_tables(RopeConfig(100.0), 4, 3), torch.ones(1, 3, 2, 4)
        >>> check_rope(x, x, tables.cos, tables.sin)
    """
    given = (q, k, cos, sin)
    before = [fact_of(x) for x in given]
    options: Any = {"position_ids": position_ids, "layout": layout, "interleaved": interleaved}
    found = apply_rope(q, k, cos, sin, **options)
    leaf_q, leaf_k = (x.detach().requires_grad_() for x in (q, k))
    again = apply_rope(leaf_q, leaf_k, cos, sin, **options)
    gradients = torch.autograd.grad(again, (leaf_q, leaf_k), (q, k))
    rows = _rows_by_token(q.shape[_TOKEN[layout]], cos, sin, position_ids)
    for x, turned, other, back in zip((q, k), found, again, gradients, strict=True):
        _demand_same("with gradients apply_rope", other.detach(), turned)
        _demand_turned("a value", x, turned, rows, layout, interleaved)
        conjugate = rows[0], -rows[1]
        # What is added up, a gradient among it, has no -0.0.
        _demand_turned("a gradient", x + 0.0, back + 0.0, conjugate, layout, interleaved)
    packed_q, packed_k = (_tokens_first(x, layout).flatten(0, 1) for x in (q, k))
    tokens = _tokens_first(q, layout).shape[:2]
    of_cos, of_sin = (row.expand(*tokens, -1).flatten(0, 1) for row in rows)
    once = apply_rope(packed_q, packed_k, of_cos, of_sin, interleaved=interleaved)
    for one, turned in zip(once, found, strict=True):
        expected = _tokens_first(turned, layout).flatten(0, 1)
        _demand_same("apply_rope of tokens that are packed", one, expected)
    for name, x, was in zip(("q", "k", "cos", "sin"), given, before, strict=True):
        demand(not wrong_elements(fact_of(x), was), f"apply_rope changed {name}")


def _tokens_first(x: Tensor, layout: str) -> Tensor:
    """`[B, S, N, D]` of whatever layout."""
    return x[None] if layout == "thd" else x.transpose(1, 2) if layout == "bhsd" else x


def _rows_by_token(
    length: int, cos: Tensor, sin: Tensor, position_ids: Tensor | int
) -> tuple[Tensor, Tensor]:
    """The rows of every token, `[S, R / 2]` or `[B, S, R / 2]`."""
    if cos.dim() == 3:
        half = cos.shape[-1] // 2
        return cos[..., :half], sin[..., :half]
    if isinstance(position_ids, int):
        position_ids = torch.arange(position_ids, position_ids + length)
    return cos[position_ids], sin[position_ids]


def _demand_same(name: str, found: Tensor, expected: Tensor) -> None:
    demand(found.dtype == expected.dtype, f"{name} gives {found.dtype}, not {expected.dtype}")
    demand(found.shape == expected.shape, f"{name} gives {found.shape}, not {expected.shape}")
    wrong = wrong_elements(fact_of(found), fact_of(expected))
    demand(not wrong, f"{name} has other bits at {wrong[:5]}")


def _pairs(x: Tensor, size: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    of = x[..., :size].double()
    found = of.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else of.chunk(2, -1)
    return found[0], found[1]


def _demand_turned(
    name: str,
    x: Tensor,
    found: Tensor,
    rows: tuple[Tensor, Tensor],
    layout: str,
    interleaved: bool,
) -> None:
    demand(found.dtype == x.dtype, f"{name} of apply_rope is {found.dtype} for {x.dtype}")
    demand(found.shape == x.shape, f"{name} of apply_rope has the shape {found.shape}")
    x, found, size = _tokens_first(x, layout), _tokens_first(found, layout), 2 * rows[0].shape[-1]
    _demand_same(f"{name} of apply_rope that is not turned", found[..., size:], x[..., size:])
    factors = [row.double().unsqueeze(-2) for row in rows]
    first, second = _pairs(x, size, interleaved)
    exact = torch.complex(first, second) * torch.complex(*factors)
    sizes = first.abs() * factors[0].abs() + second.abs() * factors[1].abs()
    other = second.abs() * factors[0].abs() + first.abs() * factors[1].abs()
    compute = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32)
    # The second part is what products that underflow may lose.
    bounds = [
        2 * compute.eps * size + 4 * compute.smallest_normal * compute.eps
        for size in (sizes, other)
    ]
    turned = _pairs(found, size, interleaved)
    for part, value, slack in zip((exact.real, exact.imag), turned, bounds, strict=True):
        low, high = (part - slack).to(x.dtype), (part + slack).to(x.dtype)
        demand_between(f"{name} of apply_rope", value.to(x.dtype), low, high)


def check_relative_positions(
    q: Tensor, k: Tensor, config: RopeConfig, *, positions: tuple[int, int], shift: int
) -> None:
    """Law: turned, a query and a key keep their lengths, and know of positions only the distance.

    Args:
        q: `[D]`.
        k: `[D]`.
        config: Of a rotary embedding without an attention factor.
        positions: Of the query and of the key, at least 0.
        shift: How far both are moved, at least 0.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> q, k = torch.tensor([1.0, 2.0]), torch.tensor([-3.0, 0.5])
        >>> check_relative_positions(q, k, RopeConfig(10000.0), positions=(2, 5), shift=7)
    """
    head_dim, num_positions = q.shape[-1], max(positions) + shift + 1
    tables = rope_tables(config, head_dim, num_positions)

    def turned(moved: int) -> list[Tensor]:
        at = torch.tensor(positions) + moved
        pair = torch.stack([q, k])[:, None].double()
        return [*apply_rope(pair, pair, tables.cos, tables.sin, position_ids=at)[0].flatten(1)]

    near, far = turned(0), turned(shift)
    # What float32 has rounded of an angle grows with the position, and tables round once more.
    unit = torch.finfo(torch.float32).eps * (2 * num_positions + 4)
    size = float(q.double().norm() * k.double().norm())
    for name, x, one in (("query", q, near[0]), ("key", k, near[1])):
        is_kept = abs(float(one.norm() - x.double().norm())) <= unit * float(x.double().norm())
        demand(is_kept, f"the {name} has the length {float(one.norm())}, not {float(x.norm())}")
    scores = float(near[0] @ near[1]), float(far[0] @ far[1])
    is_relative = abs(scores[0] - scores[1]) <= unit * size
    demand(is_relative, f"moved by {shift}, a score of {scores[0]} is {scores[1]}")
