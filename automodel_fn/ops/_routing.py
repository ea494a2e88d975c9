"""Tokens to their experts and back: gathered by expert, weighted and added up again.

Shapes: T tokens, H the hidden dimension, E experts, K of them for each token, R rows: `T * K`, and
those that fill experts up to a multiple of rows.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from automodel_fn.ops._autocast import without_autocast
from automodel_fn.ops._choice import KernelChoice, is_direct, kernel_choice
from automodel_fn.ops._functions import differentiable_once
from automodel_fn.ops._routing_sums import gradients, weighted_sums


class Routing(NamedTuple):
    """Where each token goes: rows, those of the first expert first.

    A tuple, which torch.compile can make.

    Args:
        tokens: `[R]`, int64: the token of each row. In each expert they are in their order; what
            fills an expert up is its last one again.
        experts: `[R]`, int64: the expert of each row.
        places: `[T, K]`, int64: the row of each token at each of its experts.
        ends: `[E]`, int32: the row after the last one of each expert.
        splits: How many rows each expert has, where the host was to know; otherwise None.
    """

    tokens: Tensor
    experts: Tensor
    places: Tensor
    ends: Tensor
    splits: tuple[int, ...] | None = None


def routing_of(chosen: Tensor, num_experts: int, multiple: int | None = None) -> Routing:
    """Where tokens go that have chosen their experts.

    Args:
        chosen: `[T, K]`, integer: 0 to `num_experts - 1`.
        num_experts: E.
        multiple: Each expert gets a multiple of so many rows, and the host waits to learn how many;
            None: as many as there are, and nothing waits.

    Example:
        >>> routing = routing_of(torch.tensor([[1], [0], [1]]), 3)
        >>> routing.tokens.tolist(), routing.places.tolist(), routing.ends.tolist()
        ([1, 0, 2], [[1], [0], [2]], [1, 3, 3])
    """
    flat = chosen.flatten().long()
    experts, order = flat.sort(stable=True)
    places = torch.empty_like(order)
    places.scatter_(0, order, torch.arange(len(order), device=order.device))
    all_experts = torch.arange(num_experts, device=flat.device)
    ends = torch.searchsorted(experts, all_experts, right=True)
    tokens = order // chosen.shape[1]
    if multiple is None:
        return Routing(
            tokens, experts=experts, places=places.view(chosen.shape), ends=ends.to(torch.int32)
        )
    counts = ends.diff(prepend=ends.new_zeros(1))
    filled = (counts + multiple - 1) // multiple * multiple
    # Of a meta tensor nobody can say; its shape is that without a filling.
    splits = (len(order), *[0] * (num_experts - 1)) if flat.is_meta else tuple(filled.tolist())
    if sum(splits) != len(order):
        new_ends = filled.cumsum(0)
        shift = new_ends - filled - (ends - counts)
        rows = torch.arange(sum(splits), device=flat.device)
        experts = torch.searchsorted(new_ends, rows, right=True)
        tokens = tokens[torch.minimum(rows - shift[experts], ends[experts] - 1)]
        places, ends = places + shift[flat], new_ends
    return Routing(
        tokens,
        experts=experts,
        places=places.view(chosen.shape),
        ends=ends.to(torch.int32),
        splits=splits,
    )


def dispatched(x: Tensor, routing: Routing) -> Tensor:
    """The rows `[R, H]` of the tokens `[T, H]`; gradients are added up in one order, in float32.

    Example:
        >>> routing = routing_of(torch.tensor([[1], [0]]), 2)
        >>> dispatched(torch.tensor([[1.0], [2.0]]), routing)
        tensor([[2.],
                [1.]])
    """
    apply: Any = _Dispatched.apply
    return apply(x, routing.tokens, routing.places)


def combined(rows: Tensor, weights: Tensor, routing: Routing, dtype: torch.dtype) -> Tensor:
    """The weighted sums of each token's rows, added in one order, in float32, and rounded once.

    Args:
        rows: `[R, H]`.
        weights: `[T, K]`, floating point.
        routing: Of the tokens.
        dtype: Of the result; a float64 input is computed in float64.

    Returns:
        `[T, H]`.

    Example:
        >>> routing = routing_of(torch.tensor([[1, 0]]), 2)
        >>> rows = torch.tensor([[1.0], [10.0]])
        >>> combined(rows, torch.tensor([[0.5, 2.0]]), routing, torch.float32)
        tensor([[7.]])
    """
    apply: Any = _Combined.apply
    return apply(rows, weights, routing.tokens, routing.places, dtype)


def bias_of_rows(bias: Tensor, routing: Routing) -> Tensor:
    """The bias `[E, N]` of each row's expert, `[R, N]`.

    Its gradient is a product, not a sum by atomics: the same in every run.

    Example:
        >>> routing = routing_of(torch.tensor([[1], [0], [1]]), 2)
        >>> bias_of_rows(torch.tensor([[5.0], [6.0]]), routing).flatten()
        tensor([5., 6., 6.])
    """
    apply: Any = _BiasOfRows.apply
    return apply(bias, routing.experts)


def routing_kernel(rows: Tensor, weights: Tensor | None, dtype: torch.dtype) -> KernelChoice:
    """What adds up tokens' rows, and computes their gradients: a kernel, or torch's operators.

    Kernels take plain tensors of one CUDA device in bf16, fp16 or fp32. In compiled code it is
    always torch's operators, which the compiler fuses.

    Example:
        >>> routing_kernel(torch.ones(2, 2), None, torch.float32).reason
        'rows is on cpu'
    """
    if dtype == torch.float64:
        return KernelChoice("torch", reason="the result is torch.float64")
    found = kernel_choice(rows=rows, weights=weights)
    if found.name == "triton" and not is_direct(rows, weights):
        return KernelChoice("torch", reason="somebody watches, or a tensor is no plain one")
    return found


def _is_by_kernel(rows: Tensor, weights: Tensor | None, dtype: torch.dtype) -> bool:
    if torch.compiler.is_compiling():
        return False
    return routing_kernel(rows, weights, dtype).name == "triton"


def _sums(rows: Tensor, weights: Tensor | None, places: Tensor, dtype: torch.dtype) -> Tensor:
    if not _is_by_kernel(rows, weights, dtype):
        return weighted_sums(rows, weights, places, dtype)
    from automodel_fn.ops._routing_triton import weighted_sums as by_kernel

    return by_kernel(rows, weights, places, dtype)


class _Dispatched(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tokens: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, tokens)

    @staticmethod
    @differentiable_once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _sums(dy, None, places, dy.dtype), None, None


class _Combined(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weights: Tensor, tokens: Tensor, places: Tensor, dtype: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(rows, weights, tokens, places)
        with without_autocast(rows):
            return _sums(rows, weights, places, dtype)

    @staticmethod
    @differentiable_once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        rows, weights, tokens, places = ctx.saved_tensors
        needed = ctx.needs_input_grad[:2]
        if _is_by_kernel(rows, weights, dy.dtype):
            from automodel_fn.ops._routing_triton import gradients as by_kernel

            drows, dweights = by_kernel(dy, rows, weights, places, needed)
        else:
            drows, dweights = gradients(dy, rows, weights, tokens, places, needed=needed)
        return drows, dweights, None, None, None


class _BiasOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: Tensor, experts: Tensor) -> Tensor:
        ctx.save_for_backward(experts)
        ctx.num_experts = len(bias)
        return bias.index_select(0, experts)

    @staticmethod
    @differentiable_once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: Tensor
    ) -> tuple[Tensor, None]:
        (experts,) = ctx.saved_tensors
        numbers = torch.arange(ctx.num_experts, device=experts.device)
        return (experts == numbers[:, None]).to(dy.dtype) @ dy, None
