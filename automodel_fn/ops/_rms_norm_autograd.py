"""RMSNorm of plain tensors in eager mode: the kernels on a GPU, in-place operators elsewhere."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from automodel_fn.ops._choice import needs_gradients
from automodel_fn.ops._rms_norm_torch import gradients, gradients_in_place, in_place

Output = Tensor | tuple[Tensor, Tensor]


def eager_triton(
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, weight_multiply: str
) -> Output:
    """By the kernels; both the norm and the sum where there is a residual."""
    if needs_gradients(x, weight, residual):
        found: Any = _ByTriton.apply(x, weight, residual, eps, weight_multiply == "input")
        return found
    return _triton_forward(x, weight, residual, eps, weight_multiply == "input")


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
    x: Tensor, weight: Tensor | None, residual: Tensor | None, eps: float, rounds_first: bool
) -> Output:
    y, total = _kernels().forward(x, residual, weight, eps, rounds_first)
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
    ) -> Output:
        found = _triton_forward(x, weight, residual, eps, rounds_first)
        ctx.save_for_backward(x if isinstance(found, Tensor) else found[1], weight)
        ctx.options = eps, rounds_first, None if residual is None else residual.dtype
        ctx.set_materialize_grads(False)
        return found

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Any, ...]:
        dy, dsum = grad_outputs if len(grad_outputs) == 2 else (*grad_outputs, None)
        x, weight = ctx.saved_tensors
        eps, rounds_first, residual_dtype = ctx.options
        dx, dweight = dsum, None
        if dy is not None:
            of_weight = ctx.needs_input_grad[1]
            dx, dweight = _kernels().backward(
                x, weight, dy, dsum, eps, rounds_first, of_weight=of_weight
            )
        dresidual = None
        if dx is not None and residual_dtype is not None:
            dresidual = dx.to(residual_dtype)
        return dx, dweight, dresidual, None, None


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
