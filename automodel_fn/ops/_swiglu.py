"""SwiGLU, the gate of a decoder's MLP, computed in float32 and rounded once.

Shapes: `[..., F]` is any number of leading dimensions, then the intermediate size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from automodel_fn.errors import ConfigError, itemized
from automodel_fn.ops._choice import (
    KernelChoice,
    is_direct,
    is_exporting,
    is_plain,
    is_worth_less_memory,
    kernel_choice,
    needs_gradients,
)
from automodel_fn.ops._functions import differentiable_once
from automodel_fn.ops._swiglu_operators import multiplied
from automodel_fn.ops._swiglu_torch import composed, gradients, gradients_in_place, in_place


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, computed in float32 and rounded once.

    On a GPU one kernel computes it and one its gradients, from `gate` and `up`: nothing else is
    kept for the backward pass. They may be the halves of a packed projection. The forward has the
    same bits with and without gradients, and compiled as in eager mode. DTensors may be sharded on
    any dimension, both alike. Gradients can be differentiated again where torch's operators
    compute them (`swiglu_kernel` says where), and raise where the kernels do.

    In bf16 and fp16 an element is off by its rounding and a unit in the last place at most; in
    float32 by at most 8 units. A float64 input is computed in float64.

    Args:
        gate: `[..., F]`, floating point.
        up: `[..., F]`, in the shape and the dtype of `gate`.

    Returns:
        `[..., F]`, in the dtype of `gate`.

    Raises:
        ConfigError: An argument is not as described.

    Source:
        Shazeer, "GLU Variants Improve Transformer" (2020); the fused form is that of Liger-Kernel
        (LigerSiLUMulFunction).

    Example:
        >>> swiglu(torch.tensor([1.0, -1.0]), torch.tensor([2.0, 2.0]))
        tensor([ 1.4621, -0.5379])
    """
    if gate.shape != up.shape or gate.dtype != up.dtype or not gate.is_floating_point():
        raise ConfigError(itemized("swiglu cannot be computed:", _complaints(gate, up)))
    if torch.compiler.is_compiling():
        return composed(gate, up) if is_exporting() else multiplied(gate, up)
    if not gate.is_cuda or swiglu_kernel(gate, up).name == "torch":
        return _by_operators(gate, up)
    return _eager(_ByTriton, gate, up) if is_direct(gate, up) else multiplied(gate, up)


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """What `swiglu` approximates, in float64 and rounded nowhere.

    Example:
        >>> swiglu_reference(torch.tensor([0.0, 1.0]), torch.ones(2))
        tensor([0.0000, 0.7311], dtype=torch.float64)
    """
    wide = gate.double()
    return wide / (1 + torch.exp(-wide)) * up.double()


def swiglu_kernel(gate: Tensor, up: Tensor) -> KernelChoice:
    """What `swiglu` computes with, for these inputs.

    Kernels take tensors of one CUDA device in bf16, fp16 or fp32, and DTensors of such; torch's
    own operators take the rest.

    Example:
        >>> swiglu_kernel(torch.ones(2), torch.ones(2)).reason
        'gate is on cpu'
    """
    return kernel_choice(gate=gate, up=up)


def _complaints(gate: Tensor, up: Tensor) -> list[str]:
    lines: list[str] = []
    if gate.shape != up.shape:
        shapes = f"gate has the shape {tuple(gate.shape)} and up {tuple(up.shape)}"
        lines.append(f"{shapes}; both must be the same")
    if gate.dtype != up.dtype:
        lines.append(f"gate has the dtype {gate.dtype} and up {up.dtype}; both must be the same")
    if not gate.is_floating_point():
        lines.append(f"gate has the dtype {gate.dtype}; it must be floating point")
    return lines


def _by_operators(gate: Tensor, up: Tensor) -> Tensor:
    if not gate.is_cpu or not is_plain(gate) or not is_plain(up):
        return composed(gate, up)
    # A function of Python costs autograd more than small tensors take to compute.
    if needs_gradients(gate, up) and not is_worth_less_memory(gate):
        return composed(gate, up)
    return _eager(_ByTorch, gate, up)


def _eager(function: Any, gate: Tensor, up: Tensor) -> Tensor:
    if needs_gradients(gate, up):
        return function.apply(gate, up)
    return function.compute(gate, up)


class _ByTriton(torch.autograd.Function):
    @staticmethod
    def compute(gate: Tensor, up: Tensor) -> Tensor:
        from automodel_fn.ops._swiglu_triton import forward

        return forward(gate, up)

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _ByTriton.compute(gate, up)

    @staticmethod
    @differentiable_once
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Any
    ) -> tuple[Tensor, Tensor]:
        from automodel_fn.ops._swiglu_triton import backward

        return backward(*grad_outputs, *ctx.saved_tensors)


class _ByTorch(torch.autograd.Function):
    compute = staticmethod(in_place)

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return in_place(gate, up)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor, Tensor]:
        # Gradients are on where this is to be differentiated again.
        made = gradients if torch.is_grad_enabled() else gradients_in_place
        return made(*grad_outputs, *ctx.saved_tensors)
