"""SwiGLU of a packed projection: the gradients of both halves are written where they belong."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from automodel_fn.errors import ConfigError
from automodel_fn.ops._choice import is_direct, needs_gradients
from automodel_fn.ops._functions import differentiable_once
from automodel_fn.ops._swiglu import swiglu, swiglu_kernel


def swiglu_packed(packed: Tensor) -> Tensor:
    """`swiglu(gate, up)` of the halves of a tensor, with the same bits.

    Where a kernel computes the gradients, they are not copied to lie side by side again.

    Args:
        packed: `[..., 2 F]`, floating point: the gate, then what it multiplies.

    Returns:
        `[..., F]`.

    Raises:
        ConfigError: Its last dimension has no halves, or it is not floating point.

    Example:
        >>> swiglu_packed(torch.tensor([1.0, -1.0, 2.0, 2.0]))
        tensor([ 1.4621, -0.5379])
    """
    # The halves of an odd size differ: a kernel would read on where the shorter one ends.
    if packed.dim() == 0 or packed.shape[-1] % 2:
        raise ConfigError(
            f"swiglu_packed was given the shape {tuple(packed.shape)}; its last dimension must be "
            "even: the gate, then as many that it multiplies."
        )
    gate, up = packed.chunk(2, dim=-1)
    if torch.compiler.is_compiling() or not packed.is_cuda or not needs_gradients(packed):
        return swiglu(gate, up)
    if not is_direct(packed) or swiglu_kernel(gate, up).name != "triton":
        return swiglu(gate, up)
    apply: Any = _Packed.apply
    return apply(packed)


class _Packed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, packed: Tensor) -> Tensor:
        from automodel_fn.ops._swiglu_triton import forward

        ctx.save_for_backward(packed)
        return forward(*packed.chunk(2, dim=-1))

    @staticmethod
    @differentiable_once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> Tensor:
        from automodel_fn.ops._swiglu_triton import backward_packed

        return backward_packed(*grad_outputs, *ctx.saved_tensors)
