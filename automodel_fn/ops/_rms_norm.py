"""RMSNorm that computes in float32: the same bits with and without gradients, compiled or not.

Shapes: `[..., H]` is any number of leading dimensions, then the hidden one, which is normalised.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding
from torch.nn import functional

from automodel_fn.errors import ConfigError, itemized

WeightMultiply = Literal["fp32", "input"]
_WEIGHT_MULTIPLIES = ("fp32", "input")


def rms_norm_fp32(
    x: Tensor, weight: Tensor | None, eps: float, *, weight_multiply: WeightMultiply = "fp32"
) -> Tensor:
    """`x / sqrt(mean(x ** 2) + eps) * weight` over the last dimension, computed in float32.

    The forward has the same bits with and without gradients, and compiled as in eager mode: while
    `torch.compile` traces, it becomes one opaque operator, since the compiler would otherwise fuse
    it differently with gradients and without them. Gradients come in the dtypes of their inputs; a
    compiled backward may differ from the eager one in its last bits. DTensors may be sharded on any
    dimension; on the hidden one it costs a reduction in eager mode and a gather where compiled.

    A row whose squares overflow float32 (values of about 1e19) becomes 0, as it does everywhere
    that computes in float32. A float64 input is computed in float64.

    Args:
        x: `[..., H]`, floating point.
        weight: `[H]`, floating point, of any dtype; None multiplies by nothing.
        eps: Added to the mean of the squares, at least 0; with 0 a row of zeros becomes NaN.
        weight_multiply: "fp32" multiplies in float32 and rounds once, to the dtype of `x`, as NeMo
            Automodel and Transformer Engine do. "input" rounds the normalised value to the dtype of
            `x` and multiplies then, as Hugging Face's LlamaRMSNorm does.

    Returns:
        `[..., H]`, in the dtype of `x`.

    Raises:
        ConfigError: An argument is not as described.

    Source:
        Replaces the forward of `Float32RMSNorm` (NeMo Automodel); NVIDIA-NeMo/Automodel #3106 on
        bits that depend on gradients.

    Example:
        >>> x, weight = torch.tensor([[3.0, 4.0]]).bfloat16(), torch.ones(2)
        >>> rms_norm_fp32(x, weight, 1e-5)
        tensor([[0.8477, 1.1328]], dtype=torch.bfloat16)
    """
    _demand_fitting(x, weight, eps, weight_multiply)
    if torch.compiler.is_compiling() and not _is_exporting():
        return _opaque(x, weight, eps, weight_multiply)
    return _normalized(x, weight, eps, weight_multiply)


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


def _demand_fitting(x: Tensor, weight: Tensor | None, eps: Any, weight_multiply: Any) -> None:
    lines = complaints_about_options(eps, weight_multiply)
    if not x.is_floating_point():
        lines.append(f"x has the dtype {x.dtype}; it must be floating point")
    if x.dim() == 0:
        lines.append("x has no dimension; it must be [..., H]")
    elif weight is not None and tuple(weight.shape) != (x.shape[-1],):
        expected, found = (x.shape[-1],), tuple(weight.shape)
        lines.append(f"weight has the shape {found}; the last dimension of x asks for {expected}")
    if weight is not None and not weight.is_floating_point():
        lines.append(f"weight has the dtype {weight.dtype}; it must be floating point")
    if lines:
        raise ConfigError(itemized("rms_norm_fp32 cannot be computed:", lines))


def _is_exporting() -> bool:
    # An exported program must not depend on an operator that this package registers. The flag, not
    # torch.compiler.is_exporting: traced by torch 2.11, that is True in every compilation.
    return getattr(torch.compiler, "_is_exporting_flag", False)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _normalized(x: Tensor, weight: Tensor | None, eps: float, weight_multiply: str) -> Tensor:
    wide = x.to(_compute_dtype(x))
    if weight_multiply == "input":
        rounded = _divided_by_rms(wide, eps).to(x.dtype)
        return rounded if weight is None else (weight * rounded).to(x.dtype)
    wide_weight = None if weight is None else weight.to(wide.dtype)
    if _is_sharded_on_last(x):
        found = _divided_by_rms(wide, eps)
        return (found if wide_weight is None else found * wide_weight).to(x.dtype)
    return functional.rms_norm(wide, (x.shape[-1],), wide_weight, eps).to(x.dtype)


def _divided_by_rms(wide: Tensor, eps: float) -> Tensor:
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def _is_sharded_on_last(x: Tensor) -> bool:
    # torch's own rms_norm adds eps in place, which a mean over a sharded dimension cannot take.
    placements = getattr(x, "placements", ())
    return any(getattr(placement, "dim", None) == x.dim() - 1 for placement in placements)


@torch.library.custom_op("automodel_fn::rms_norm_fp32", mutates_args=())
def _opaque(x: Tensor, weight: Tensor | None, eps: float, weight_multiply: str) -> Tensor:
    return _normalized(x, weight, eps, weight_multiply)


@_opaque.register_fake
def _(x: Tensor, weight: Tensor | None, eps: float, weight_multiply: str) -> Tensor:
    return _normalized(x, weight, eps, weight_multiply)


@register_sharding(torch.ops.automodel_fn.rms_norm_fp32.default)
def _(x: Any, weight: Any, eps: float, weight_multiply: str) -> list[Any]:
    whole = None if weight is None else Replicate()
    leading = [Shard(dim) for dim in range(len(x.shape) - 1)]
    return [([place], [place, whole, None, None]) for place in (Replicate(), *leading)]


def _save_inputs(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, ctx.weight_multiply = inputs
    ctx.save_for_backward(x, weight)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
    x, weight = ctx.saved_tensors
    wide, grad = x.to(_compute_dtype(x)), grad.to(_compute_dtype(x))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + ctx.eps)
    normalized = wide * scale
    of_x = of_weight = None
    if ctx.needs_input_grad[0]:
        inner = grad if weight is None else grad * weight.to(grad.dtype)
        mean = (inner * normalized).mean(-1, keepdim=True)
        of_x = (scale * (inner - normalized * mean)).to(x.dtype)
    if weight is not None and ctx.needs_input_grad[1]:
        if ctx.weight_multiply == "input":
            normalized = normalized.to(x.dtype).to(grad.dtype)
        rows = tuple(range(x.dim() - 1))
        terms = grad * normalized
        of_weight = (terms.sum(rows) if rows else terms).to(weight.dtype)
    return of_x, of_weight, None, None


_opaque.register_autograd(_gradients, setup_context=_save_inputs)
