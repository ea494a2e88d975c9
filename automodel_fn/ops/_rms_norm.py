"""RMSNorm that computes in float32: the same bits with and without gradients, compiled or not.

Shapes: `[..., H]` is any number of leading dimensions, then the hidden one, which is normalised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.compiler import is_compiling, is_dynamo_compiling

from automodel_fn.errors import ConfigError, itemized
from automodel_fn.ops import _rms_norm_operators as operators
from automodel_fn.ops._choice import (
    KernelChoice,
    is_direct,
    is_exporting,
    is_plain,
    is_worth_less_memory,
    kernel_choice,
)
from automodel_fn.ops._rms_norm_autograd import eager_torch, eager_triton, eager_triton_again
from automodel_fn.ops._rms_norm_torch import (
    added,
    composed,
    is_sharded_on_last,
    natively,
    small_natively,
)

WeightMultiply = Literal["fp32", "input"]
_WEIGHT_MULTIPLIES = ("fp32", "input")


@overload
def rms_norm_fp32(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_multiply: WeightMultiply = "fp32",
    residual: None = None,
) -> Tensor: ...


@overload
def rms_norm_fp32(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_multiply: WeightMultiply = "fp32",
    residual: Tensor,
) -> tuple[Tensor, Tensor]: ...


def rms_norm_fp32(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_multiply: WeightMultiply = "fp32",
    residual: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last dimension, computed in float32.

    On a GPU one kernel computes it, and two its gradients; `rms_norm_kernel` says where not. The
    forward has the same bits with and without gradients, and compiled as in eager mode: while
    `torch.compile` traces, it becomes one opaque operator, since the compiler would otherwise fuse
    it differently with gradients and without them. Gradients come in the dtypes of their inputs,
    the same in every run; they can be differentiated again where torch's operators compute them,
    and raise where the kernels do. DTensors may be sharded on any dimension; on the hidden one it
    costs a reduction in eager mode and a gather where compiled.

    An element is off from the float64 result by its rounding to bf16 or fp16, and a unit in the
    last place of that dtype at most. In float32 its relative error is at most H / 2 + 8 halves of
    the epsilon; measured it is about one. A row whose squares overflow float32 (values of about
    1e19) becomes 0, as it does everywhere that computes in float32. A float64 input is computed in
    float64.

    Args:
        x: `[..., H]`, floating point.
        weight: `[H]`, floating point, of any dtype; None multiplies by nothing.
        eps: Added to the mean of the squares, at least 0; with 0 a row of zeros becomes NaN.
        weight_multiply: "fp32" multiplies in float32 and rounds once, to the dtype of `x`, as NeMo
            Automodel and Transformer Engine do. "input" rounds the normalised value to the dtype of
            `x` and multiplies then, as Hugging Face's LlamaRMSNorm does.
        residual: `[..., H]`, the shape of `x`: what a decoder with norms before its layers adds
            to `x`. The sum is rounded to the dtype of `x`, and the norm is that of the rounded
            sum: both have the bits that adding first would give.

    Returns:
        `[..., H]`, in the dtype of `x`; with a residual, that and the sum.

    Raises:
        ConfigError: An argument is not as described.

    Source:
        Replaces the forward of `Float32RMSNorm` (NeMo Automodel); NVIDIA-NeMo/Automodel #3106 on
        bits that depend on gradients; fused_add_rms_norm (vLLM) for the residual.

    Example:
        >>> x, weight = torch.tensor([[3.0, 4.0]]).bfloat16(), torch.ones(2)
        >>> rms_norm_fp32(x, weight, 1e-5)
        tensor([[0.8477, 1.1328]], dtype=torch.bfloat16)
        >>> normed, total = rms_norm_fp32(x, weight, 1e-5, residual=x)
        >>> total
        tensor([[6., 8.]], dtype=torch.bfloat16)
    """
    if not is_dynamo_compiling():
        quickly = eager_triton_again if x.is_cuda else small_natively
        found = quickly(x, weight, residual, eps, weight_multiply)
        if found is not None:
            return found
    if not _fits(x, weight, eps, weight_multiply, residual):
        lines = _complaints(x, weight, eps, weight_multiply, residual)
        raise ConfigError(itemized("rms_norm_fp32 cannot be computed:", lines))
    if is_compiling():
        by = _by_operators if is_exporting() else _by_operator
        return by(x, weight, eps, weight_multiply, residual)
    if not x.is_cuda or rms_norm_kernel(x, weight, residual).name == "torch":
        return _by_operators(x, weight, eps, weight_multiply, residual)
    if is_direct(x, weight, residual):
        return eager_triton(x, weight, residual, eps, weight_multiply)
    return _by_operator(x, weight, eps, weight_multiply, residual)


def rms_norm_kernel(
    x: Tensor, weight: Tensor | None, residual: Tensor | None = None
) -> KernelChoice:
    """What `rms_norm_fp32` computes with, for these inputs.

    Kernels take tensors of one CUDA device in bf16, fp16 or fp32, and DTensors that keep rows
    whole; torch's own operators take the rest.

    Example:
        >>> rms_norm_kernel(torch.ones(2, 3), None).reason
        'x is on cpu'
    """
    if x.is_cuda and is_sharded_on_last(x):
        return KernelChoice("torch", reason="x is sharded over its last dimension")
    return kernel_choice(x=x, weight=weight, residual=residual)


def rms_norm_reference(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """What `rms_norm_fp32` approximates, in float64 and rounded nowhere.

    Example:
        >>> rms_norm_reference(torch.tensor([3.0, 4.0]), None, 0.5)
        tensor([0.8321, 1.1094], dtype=torch.float64)
    """
    wide = x.double()
    normalized = wide / torch.sqrt((wide * wide).sum(-1, keepdim=True) / x.shape[-1] + eps)
    return normalized if weight is None else normalized * weight.double()


def complaints_about_options(eps: Any, weight_multiply: Any) -> list[str]:
    """What is wrong with the options of a norm, a line each."""
    lines: list[str] = []
    is_number = isinstance(eps, int | float) and not isinstance(eps, bool)
    if not is_number or not 0 <= eps < math.inf:
        lines.append(f"eps={eps!r} must be a finite number of at least 0, such as 1e-5")
    if weight_multiply not in _WEIGHT_MULTIPLIES:
        lines.append(f"weight_multiply={weight_multiply!r} must be 'fp32' or 'input'")
    return lines


def _fits(x: Tensor, weight: Any, eps: Any, weight_multiply: Any, residual: Any) -> bool:
    return (
        type(eps) is float
        and 0.0 <= eps < math.inf
        and weight_multiply in _WEIGHT_MULTIPLIES
        and x.is_floating_point()
        and x.dim() > 0
        and (weight is None or (weight.shape == x.shape[-1:] and weight.is_floating_point()))
        and (residual is None or (residual.shape == x.shape and residual.is_floating_point()))
    ) or not _complaints(x, weight, eps, weight_multiply, residual)


def _complaints(
    x: Tensor, weight: Tensor | None, eps: Any, weight_multiply: Any, residual: Tensor | None
) -> list[str]:
    lines = complaints_about_options(eps, weight_multiply)
    if not x.is_floating_point():
        lines.append(f"x has the dtype {x.dtype}; it must be floating point")
    if x.dim() == 0:
        lines.append("x has no dimension; it must be [..., H]")
    elif weight is not None and tuple(weight.shape) != (x.shape[-1],):
        expected, found = (x.shape[-1],), tuple(weight.shape)
        lines.append(f"weight has the shape {found}; the last dimension of x asks for {expected}")
    if residual is not None and residual.shape != x.shape:
        expected, found = tuple(x.shape), tuple(residual.shape)
        lines.append(f"residual has the shape {found}; x has {expected}, and both must be the same")
    for name, tensor in (("weight", weight), ("residual", residual)):
        if tensor is not None and not tensor.is_floating_point():
            lines.append(f"{name} has the dtype {tensor.dtype}; it must be floating point")
    return lines


def _by_operator(
    x: Tensor, weight: Tensor | None, eps: float, weight_multiply: str, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return operators.normed(x, weight, eps, weight_multiply)
    return operators.added_and_normed(x, residual, weight, eps, weight_multiply)


def _by_operators(
    x: Tensor, weight: Tensor | None, eps: float, weight_multiply: str, residual: Tensor | None
) -> Tensor | tuple[Tensor, Tensor]:
    total = x if residual is None else added(x, residual)
    y = _implementation(total, weight)(total, weight, eps, weight_multiply)
    return y if residual is None else (y, total)


def _implementation(x: Tensor, weight: Tensor | None) -> Callable[..., Tensor]:
    if not x.is_cpu or is_compiling():
        return composed
    if not is_plain(x) or not (weight is None or is_plain(weight)):
        return composed
    return eager_torch if is_worth_less_memory(x) else natively
