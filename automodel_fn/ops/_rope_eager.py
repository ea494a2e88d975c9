"""Rotary embeddings outside of compiled code: what computes them, and their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.distributed.tensor import DTensor

from automodel_fn.ops._choice import KernelChoice
from automodel_fn.ops._rope_rotation import Rotation, rotated_by_torch

_FUSED = (torch.bfloat16, torch.float16, torch.float32)
_PLAIN = (Tensor, torch.nn.Parameter)


def rope_kernel(q: Tensor, k: Tensor) -> KernelChoice:
    """What computes `apply_rope` of these, and why. Reads no values.

    Of DTensors: what computes it of their shards.

    Example:
        >>> rope_kernel(torch.ones(1, 1, 2), torch.ones(1, 1, 2))
        KernelChoice(name='torch', reason='q is on cpu')
    """
    if isinstance(q, DTensor) and isinstance(k, DTensor):
        return rope_kernel(q._local_tensor, k._local_tensor)
    reason = _reason_for_torch(q, k)
    if reason:
        return KernelChoice("torch", reason=reason)
    return KernelChoice("triton", reason=f"q and k are {q.dtype} on {q.device.type}")


def _reason_for_torch(q: Tensor, k: Tensor) -> str:
    if not q.is_cuda:
        return f"q is on {q.device.type}"
    if q.dtype not in _FUSED:
        return f"q is {q.dtype}"
    if type(q) not in _PLAIN or type(k) not in _PLAIN:
        return f"q is a {type(q).__name__} and k is a {type(k).__name__}"
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms what is called"
    return ""


def rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """What `apply_rope` returns, of tensors that fit; differentiable."""
    if _reason_for_torch(q, k):
        return rotated_by_torch(q, k, cos, sin, ids, rotation)
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rotated.apply(q, k, cos, sin, ids, rotation)
    return _by_triton(q, k, cos, sin, ids, rotation)


def rotated_below_autograd(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """The same, for autograd to know nothing of, laid out as `torch.empty_like` lays out."""
    if not _reason_for_torch(q, k):
        return _by_triton(q, k, cos, sin, ids, rotation)
    found = rotated_by_torch(q, k, cos, sin, ids, rotation)
    return torch.empty_like(q).copy_(found[0]), torch.empty_like(k).copy_(found[1])


def _by_triton(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    # Triton is not everywhere, and takes long to import.
    from automodel_fn.ops._apply_rope_triton import rotated_by_triton

    return rotated_by_triton(q, k, cos, sin, ids, rotation)


class _Rotated(Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        cos: Tensor,
        sin: Tensor,
        ids: Tensor | None,
        rotation: Rotation,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin, ids)
        ctx.rotation = rotation
        return _by_triton(q, k, cos, sin, ids, rotation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Itself differentiable: the gradient is a rotation too.
        of_q, of_k = rotated(*grads, *ctx.saved_tensors, ctx.rotation.inverted())
        return of_q, of_k, None, None, None, None
