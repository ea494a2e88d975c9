"""Autograd functions that cost the host little: what PyTorch does around them, where needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def plain_apply(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply` for calls outside of `torch.func`, of tensors that are no wrappers of it.

    PyTorch's own looks for these in every call, which takes a third of its time.

    Args:
        function: One whose `forward` takes the context.

    Example:
        >>> class Doubled(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return 2 * x
        ...     @staticmethod
        ...     def backward(ctx, dy):
        ...         return 2 * dy
        >>> x = torch.ones(1, requires_grad=True)
        >>> torch.autograd.grad(plain_apply(Doubled)(x), x)
        (tensor([2.]),)
    """
    bases: Any = super(torch.autograd.Function, function)
    return bases.apply


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward whose results raise where they are differentiated again.

    As PyTorch's `once_differentiable`, which turns gradients off, and costs the host that, also
    where they are: everywhere but under `create_graph=True`.

    Args:
        backward: Takes the context and the gradients of the outputs.

    Example:
        >>> class Doubled(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return 2 * x
        ...     @staticmethod
        ...     @differentiable_once
        ...     def backward(ctx, dy):
        ...         return 2 * dy
        >>> x = torch.ones(1, requires_grad=True)
        >>> torch.autograd.grad(Doubled.apply(x), x)
        (tensor([2.]),)
    """
    guarded = once_differentiable(backward)

    @wraps(backward)
    def either(ctx: Any, *grad_outputs: Any) -> Any:
        if torch.is_grad_enabled():
            return guarded(ctx, *grad_outputs)
        return backward(ctx, *grad_outputs)

    return either
