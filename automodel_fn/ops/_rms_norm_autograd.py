"""RMSNorm of plain tensors in eager mode: the kernels on a GPU, in-place operators elsewhere."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from automodel_fn.ops._choice import (
    PLAIN,
    has_triton,
    is_transformed,
    is_watched,
    needs_gradients,
)
from automodel_fn.ops._rms_norm_torch import gradients, gradients_in_place, in_place

Output = Tensor | tuple[Tensor, Tensor]


def eager_triton(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, weight_multiply: str
) -> Output:
    """By the kernels; both the norm and the sum where there is a residual."""
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
        if type(weight) not in PLAIN or not weight.is_contiguous():
            return None
        of_weight = weight.shape, weight.dtype, weight.get_device()
    if residual is not None:
        if type(residual) is not Tensor or not residual.is_contiguous():
            return None
        of_residual = residual.shape, residual.dtype, residual.get_device()
    if not x.is_contiguous():
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
    options = eps, weight_multiply == "input", alike, again
    if needs_gradients(x, weight, residual):
        found: Any = _ByTriton.apply(x, weight, residual, *options)
        return found
    return _triton_forward(x, weight, residual, *options)


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


def _triton_forward(
    x: Tensor,
    weight: Tensor | None,
    residual: Tensor | None,
    eps: float,
    rounds_first: bool,
    alike: Any,
    again: Any,
) -> Output:
    forward = _kernels().forward
    y, total = forward(x, residual, weight, eps, rounds_first, alike=alike, again=again)
    return y if total is None else (y, total)


class _ByTriton(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        residual: Tensor | None,
        eps: float,
        rounds_first: bool,
        alike: Any,
        again: Any,
    ) -> Output:
        found = _triton_forward(x, weight, residual, eps, rounds_first, alike, again)
        ctx.save_for_backward(x if residual is None else found[1], weight)
        ctx.options = eps, rounds_first, None if residual is None else residual.dtype, again
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Any, ...]:
        dy, dsum = grad_outputs if len(grad_outputs) == 2 else (*grad_outputs, None)
        x, weight = ctx.saved_tensors
        eps, rounds_first, residual_dtype, again = ctx.options
        dx, dweight = dsum, None
        if dy is not None:
            of_weight = ctx.needs_input_grad[1]
            dx, dweight = _kernels().backward(
                x, weight, dy, dsum, eps, rounds_first, of_weight=of_weight, again=again
            )
        dresidual = None
        if dx is not None and residual_dtype is not None:
            dresidual = dx.to(residual_dtype)
        return dx, dweight, dresidual, None, None, None, None


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
