"""Rotary embeddings outside of compiled code: what computes them, and their gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from automodel_fn.ops._choice import KernelChoice, kernel_choice
from automodel_fn.ops._rope_rotation import Rotation, rotated_below_autograd


def rope_kernel(q: Tensor, k: Tensor) -> KernelChoice:
    """What `apply_rope` computes with, for these inputs.

    The kernel takes tensors of one CUDA device in bf16, fp16 or fp32, and of DTensors their shards;
    torch's own operators take the rest.

    Example:
        >>> rope_kernel(torch.ones(1, 1, 2), torch.ones(1, 1, 2))
        KernelChoice(name='torch', reason='q is on cpu')
    """
    choice = kernel_choice(q=q, k=k)
    if choice.name == "triton" and torch._C._are_functorch_transforms_active():
        return KernelChoice("torch", reason="a transform of torch.func is at work")
    return choice


def rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """What `apply_rope` returns of plain tensors, with gradients where they are wanted."""
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return _Rotated.apply(q, k, cos, sin, ids, rotation)
    return rotated_by_kernel(q, k, cos, sin, ids, rotation)


def rotated_by_kernel(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """The same without gradients, by the kernel of `rope_kernel`."""
    if rope_kernel(q, k).name == "torch":
        return rotated_below_autograd(q, k, cos, sin, ids, rotation)
    # Triton is not everywhere, and takes long to import.
    from automodel_fn.ops._apply_rope_triton import launch_rotation

    return launch_rotation(q, k, cos, sin, ids, rotation)


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
        return rotated_by_kernel(q, k, cos, sin, ids, rotation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # Itself differentiable: the gradient is a rotation too.
        (of_q, of_k), (cos, sin, ids) = grads, ctx.saved_tensors
        of_q, of_k = rotated(of_q, of_k, cos, sin, ids, ctx.rotation.inverted())
        return of_q, of_k, None, None, None, None
