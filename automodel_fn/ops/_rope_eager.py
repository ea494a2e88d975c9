"""Rotary embeddings outside of compiled code, and their gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.autograd import Function

from automodel_fn.ops._choice import is_direct, needs_gradients
from automodel_fn.ops._rope_kernel import rotated_by_kernel
from automodel_fn.ops._rope_operator import rope_operator
from automodel_fn.ops._rope_rotation import Rotation


def rotated(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    """What `apply_rope` returns, with gradients where they are wanted.

    One operator where somebody looks at operators, else straight to the kernel.
    """
    if not is_direct(q, k, cos, sin, ids):
        return rope_operator(q, k, cos, sin, ids, *rotation)
    if needs_gradients(q, k):
        return _Rotated.apply(q, k, cos, sin, ids, rotation)
    return rotated_by_kernel(q, k, cos, sin, ids, rotation)


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
