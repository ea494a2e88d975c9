"""RMSNorm by torch's own operators: differentiable, and in place where nobody differentiates."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

from automodel_fn.ops._choice import PLAIN, is_transformed, is_worth_less_memory

Gradients = tuple[Tensor | None, Tensor | None]
_NATIVE_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16))


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a norm of `x` is computed in.

    Example:
        >>> compute_dtype(torch.ones(1).half())
        torch.float32
    """
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def added(x: Tensor, residual: Tensor) -> Tensor:
    """The sum of both, rounded once, to the dtype of `x`.

    Example:
        >>> added(torch.ones(1).half(), torch.ones(1))
        tensor([2.], dtype=torch.float16)
    """
    return (x + residual).to(x.dtype)


def composed(x: Tensor, weight: Tensor | None, eps: float, weight_multiply: str) -> Tensor:
    """The norm, of operators that can be differentiated, mapped, sharded and exported.

    Example:
        >>> composed(torch.tensor([3.0, 4.0]), None, 0.0, "fp32")
        tensor([0.8485, 1.1314])
    """
    wide = x.to(compute_dtype(x))
    if weight_multiply == "input":
        rounded = _divided_by_rms(wide, eps).to(x.dtype)
        return rounded if weight is None else (weight * rounded).to(x.dtype)
    wide_weight = None if weight is None else weight.to(wide.dtype)
    if is_sharded_on_last(x):
        found = _divided_by_rms(wide, eps)
        return (found if wide_weight is None else found * wide_weight).to(x.dtype)
    return functional.rms_norm(wide, (x.shape[-1],), wide_weight, eps).to(x.dtype)


def natively(x: Tensor, weight: Tensor | None, eps: float, weight_multiply: str) -> Tensor:
    """The bits of `composed` on a CPU, in one call where torch widens and rounds by itself.

    Example:
        >>> natively(torch.tensor([3.0, 4.0]), None, 0.0, "fp32")
        tensor([0.8485, 1.1314])
    """
    if weight_multiply == "fp32" and (weight is None or weight.dtype == x.dtype):
        return functional.rms_norm(x, (x.shape[-1],), weight, eps)
    return composed(x, weight, eps, weight_multiply)


def small_natively(
    x: Tensor, weight: Any, residual: Any, eps: Any, weight_multiply: Any
) -> Tensor | None:
    """What `natively` gives for a small norm on a CPU, asked in as few steps as can be.

    So small a norm takes no longer than all of its checks. None where anything is not simple.

    Args:
        x: A tensor; all else may be anything, also wrong.
        weight: As for `rms_norm_fp32`.
        residual: As for `rms_norm_fp32`.
        eps: As for `rms_norm_fp32`.
        weight_multiply: As for `rms_norm_fp32`.

    Example:
        >>> small_natively(torch.tensor([3.0, 4.0]), torch.ones(2), None, 0.0, "fp32")
        tensor([0.8485, 1.1314])
    """
    if (
        type(x) is Tensor
        and type(weight) in PLAIN
        and residual is None
        and type(eps) is float
        and 0.0 <= eps < math.inf
        and weight_multiply == "fp32"
        and x.dtype is weight.dtype
        and x.dtype in _NATIVE_DTYPES
        and x.is_cpu
        and x.dim()
        and weight.dim() == 1
        and x.shape[-1] == weight.numel()
        and not is_worth_less_memory(x)
        and not is_transformed()
    ):
        return torch.rms_norm(x, weight.shape, weight, eps)
    return None


def in_place(x: Tensor, weight: Tensor | None, eps: float, weight_multiply: str) -> Tensor:
    """The bits of `composed`, in less memory: what is widened or multiplied is overwritten.

    Example:
        >>> in_place(torch.tensor([3.0, 4.0]), None, 0.0, "fp32")
        tensor([0.8485, 1.1314])
    """
    found, _ = _normalized(x, eps)
    if weight is None:
        return found.to(x.dtype)
    if weight_multiply == "input":
        return (weight * found.to(x.dtype)).to(x.dtype)
    return found.mul_(weight.to(found.dtype)).to(x.dtype)


def gradients(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_multiply: str,
    wanted: tuple[bool, bool],
) -> Gradients:
    """The gradients of `x` and of the weight, of operators that can be differentiated again.

    Example:
        >>> x, dy = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
        >>> gradients(dy, x, None, 0.0, "fp32", (True, False))
        (tensor([[ 0.1810, -0.1358]]), None)
    """
    wide, dy = x.to(compute_dtype(x)), dy.to(compute_dtype(x))
    scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    normalized = wide * scale
    of_x = of_weight = None
    if wanted[0]:
        inner = dy if weight is None else dy * weight.to(dy.dtype)
        mean = (inner * normalized).mean(-1, keepdim=True)
        of_x = (scale * (inner - normalized * mean)).to(x.dtype)
    if weight is not None and wanted[1]:
        if weight_multiply == "input":
            normalized = normalized.to(x.dtype).to(dy.dtype)
        of_weight = _summed_over_rows(dy * normalized).to(weight.dtype)
    return of_x, of_weight


def gradients_in_place(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    weight_multiply: str,
    wanted: tuple[bool, bool],
) -> Gradients:
    """What `gradients` gives, up to the order of a sum, in less memory.

    Example:
        >>> x, dy = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
        >>> gradients_in_place(dy, x, None, 0.0, "fp32", (True, False))
        (tensor([[ 0.1810, -0.1358]]), None)
    """
    normalized, scale = _normalized(x, eps)
    wide = dy.to(normalized.dtype)
    of_x = of_weight = None
    if weight is not None and wanted[1]:
        is_rounded = weight_multiply == "input" and x.dtype != normalized.dtype
        other = normalized.to(x.dtype) if is_rounded else normalized
        of_weight = _summed_over_rows(wide * other).to(weight.dtype)
    if wanted[0]:
        inner: Tensor = wide.clone() if wide is dy else wide
        if weight is not None:
            inner.mul_(weight.to(inner.dtype))
        mean = torch.linalg.vecdot(inner, normalized).unsqueeze(-1).div_(x.shape[-1])
        of_x = inner.sub_(normalized.mul_(mean)).mul_(scale).to(x.dtype)
    return of_x, of_weight


def is_sharded_on_last(x: Tensor) -> bool:
    """Whether it is a DTensor whose rows lie on several devices.

    Example:
        >>> is_sharded_on_last(torch.ones(2))
        False
    """
    # torch's own rms_norm adds eps in place, which a mean over a sharded dimension cannot take.
    last = x.dim() - 1
    return isinstance(x, DTensor) and any(place.is_shard(last) for place in x.placements)


def _divided_by_rms(wide: Tensor, eps: float) -> Tensor:
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def _normalized(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(compute_dtype(x))
    scale = wide.pow(2).mean(-1, keepdim=True).add_(eps).rsqrt_()
    return (wide * scale if wide is x else wide.mul_(scale)), scale


def _summed_over_rows(terms: Tensor) -> Tensor:
    rows = tuple(range(terms.dim() - 1))
    return terms.sum(rows) if rows else terms
