"""RMSNorm of plain tensors in eager mode: the kernels on a GPU, in-place operators elsewhere."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from automodel_fn.ops._choice import (
    PLAIN,
    has_triton,
    is_transformed,
    is_watched,
    is_wrapper,
    needs_gradients,
)
from automodel_fn.ops._functions import differentiable_once, plain_apply
from automodel_fn.ops._rms_norm_torch import gradients, gradients_in_place, in_place

Output = Tensor | tuple[Tensor, Tensor]


def eager_triton(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, weight_multiply: str
) -> Output:
    """By the kernels; both the norm and the sum where there is a residual.

    Args:
        x: Plain, on CUDA, as are the others, and checked.
        weight: As for `rms_norm_fp32`.
        residual: As for `rms_norm_fp32`.
        eps: As for `rms_norm_fp32`.
        weight_multiply: As for `rms_norm_fp32`.
    """
    alike = _likeness(x, weight, residual, eps, weight_multiply)
    return _by_triton(x, weight, residual, eps, weight_multiply, alike, None)


def eager_triton_again(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, weight_multiply: str
) -> Output | None:
    """What `eager_triton` gives where it had these arguments before, but for numbers in tensors.

    Then they have been checked, and a kernel was compiled for them, which one key says. None where
    that is not so, or cannot be known.

    Args:
        x: A tensor on CUDA; all else may be anything, also wrong.
        weight: As for `rms_norm_fp32`.
        residual: As for `rms_norm_fp32`.
        eps: As for `rms_norm_fp32`.
        weight_multiply: As for `rms_norm_fp32`.
    """
    if is_watched() or is_transformed() or not has_triton():
        return None
    alike = _likeness(x, weight, residual, eps, weight_multiply)
    again = None if alike is None else _kernels().forward_again(alike)
    if again is None:
        return None
    return _by_triton(x, weight, residual, eps, weight_multiply, alike, again)


def _likeness(x: Any, weight: Any, residual: Any, eps: Any, weight_multiply: Any) -> Any:
    # Of all that a launch follows from, None where it is not simple: gaps, subclasses, ints. Type
    # by type, since True, 1 and 1.0 are the same key. One tuple: to hash more takes longer.
    if type(x) is not Tensor or type(eps) is not float or type(weight_multiply) is not str:
        return None
    of_weight = of_residual = None
    if weight is not None:
        if type(weight) not in PLAIN or is_wrapper(weight) or not weight.is_contiguous():
            return None
        of_weight = weight.shape, weight.dtype, weight.get_device()
    if residual is not None:
        if type(residual) is not Tensor or is_wrapper(residual) or not residual.is_contiguous():
            return None
        of_residual = residual.shape, residual.dtype, residual.get_device()
    if is_wrapper(x) or not x.is_contiguous():
        return None
    return x.shape, x.dtype, x.get_device(), of_weight, of_residual, eps, weight_multiply


def _by_triton(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    weight_multiply: str,
    alike: Any,
    again: Any,
) -> Output:
    rounds_first = weight_multiply == "input"
    if needs_gradients(x, weight, residual):
        return _apply_triton(x, weight, residual, (eps, rounds_first, alike, again))
    return _kernels().forward(x, residual, weight, eps, rounds_first, alike, again)


def eager_torch(x: Tensor, weight: Tensor | None, eps: float, weight_multiply: str) -> Tensor:
    """By torch's operators, which overwrite what they need not keep.

    Example:
        >>> eager_torch(torch.tensor([3.0, 4.0]), None, 0.0, "fp32")
        tensor([0.8485, 1.1314])
    """
    if needs_gradients(x, weight):
        found: Any = _ByTorch.apply(x, weight, eps, weight_multiply)
        return found
    return in_place(x, weight, eps, weight_multiply)


@cache
def _kernels() -> Any:
    # Found once: an import costs the host more in each call than all of our checks.
    from automodel_fn.ops import _rms_norm_triton

    return _rms_norm_triton


class _ByTriton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        residual: Tensor | None,
        options: tuple[Any, ...],
    ) -> Output:
        found = _kernels().forward(x, residual, weight, *options)
        ctx.save_for_backward(x if residual is None else found[1], weight)
        ctx.options, ctx.residual_dtype = options, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @differentiable_once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Any, ...]:
        dy, dsum = grad_outputs if len(grad_outputs) == 2 else (*grad_outputs, None)
        x, weight = ctx.saved_tensors
        eps, rounds_first, _, again = ctx.options
        dx, dweight = dsum, None
        if dy is not None:
            of_weight = ctx.needs_input_grad[1]
            dx, dweight = _kernels().backward(
                x, weight, dy, dsum, eps, rounds_first, of_weight=of_weight, again=again
            )
        dresidual = None
        if dx is not None and ctx.residual_dtype is not None:
            dresidual = dx.to(ctx.residual_dtype)
        return dx, dweight, dresidual, None


_apply_triton = plain_apply(_ByTriton)


class _ByTorch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, eps: float, weight_multiply: str
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.options = eps, weight_multiply
        return in_place(x, weight, eps, weight_multiply)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Any, ...]:
        (dy,), (x, weight), (eps, weight_multiply) = grad_outputs, ctx.saved_tensors, ctx.options
        # Gradients are on where this is to be differentiated again.
        made = gradients if torch.is_grad_enabled() else gradients_in_place
        wanted = ctx.needs_input_grad[:2]
        return *made(dy, x, weight, eps, weight_multiply, wanted), None, None
