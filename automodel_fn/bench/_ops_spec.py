"""What the benchmark "ops" needs to know of an op: its cases, inputs, exact results and peers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import torch
from torch import Tensor

from automodel_fn.bench._device_time import Call
from automodel_fn.bench._spec import Case

OURS, TORCH, TE, LIGER, QUACK = "automodel_fn", "torch", "Transformer Engine", "Liger", "quack"
OURS_SPLIT, OURS_BF16 = f"{OURS}, split in the call", f"{OURS}, bf16"
TORCH_CHUNKED, TORCH_TF32, TORCH_BF16 = (f"{TORCH}, {how}" for how in ("chunked", "TF32", "bf16"))
CEILING = "ceiling"


@attrs.frozen(eq=False)
class Inputs:
    """One set of inputs, and the gradients of what is computed from them.

    Args:
        tensors: The arguments.
        grads: A gradient for each output.
    """

    tensors: tuple[Tensor, ...]
    grads: tuple[Tensor, ...] = attrs.field(kw_only=True)

    @property
    def differentiated(self) -> tuple[Tensor, ...]:
        """The arguments that get a gradient."""
        return tuple(tensor for tensor in self.tensors if tensor.requires_grad)


@attrs.frozen(eq=False)
class Exact:
    """Results in float64.

    Args:
        outputs: What is computed.
        gradients: Of each argument that gets one.
    """

    outputs: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...] = attrs.field(kw_only=True)


@attrs.frozen(eq=False)
class Prepared:
    """A subject that is ready to run on each set of inputs.

    Args:
        forwards: Computes the outputs of a set, keeping what a backward needs.
        both: Computes outputs and gradients of a set.
    """

    forwards: tuple[Call, ...]
    both: tuple[Call, ...] = attrs.field(kw_only=True)


Prepare = Callable[..., Call]
"""Given the arguments: a call which computes the output, or a tuple of them."""


@attrs.frozen
class Op:
    """An op, and everyone who computes it.

    Args:
        cases: Its cases; their parameters "forward_bytes" and "forward_backward_bytes" are what
            must be read and written.
        inputs: Makes a set of inputs.
        exact: Makes the exact results.
        ways: How each subject computes it.
        ceiling: What could at best be reached; given a case and the number of sets.
    """

    cases: tuple[Case, ...]
    inputs: Callable[[Case, torch.Generator], Inputs] = attrs.field(kw_only=True)
    exact: Callable[[Inputs], Exact] = attrs.field(kw_only=True)
    ways: Mapping[str, Prepare] = attrs.field(kw_only=True)
    ceiling: Callable[[Case, int], Prepared] = attrs.field(kw_only=True)


def random_tensor(case: Case, generator: torch.Generator, *shape: int) -> Tensor:
    """Normally distributed, on the case's device; in bf16 or, if its "is_bf16" is 0, in float32."""
    dtype = torch.bfloat16 if case.parameter("is_bf16") else torch.float32
    return torch.randn(shape, generator=generator, device=case.device, dtype=dtype)


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    """One output or several as a tuple."""
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def by_autograd(formula: Callable[..., Any]) -> Callable[[Inputs], Exact]:
    """The exact results of a formula: computed in float64, and differentiated by autograd.

    Example:
        >>> x = torch.tensor([3.0], requires_grad=True)
        >>> found = by_autograd(torch.square)(Inputs((x,), grads=(torch.ones(1),)))
        >>> found.outputs, found.gradients
        ((tensor([9.], dtype=torch.float64),), (tensor([6.], dtype=torch.float64),))
    """

    def exact(inputs: Inputs) -> Exact:
        wide = tuple(
            tensor.detach().double().requires_grad_(tensor.requires_grad)
            if tensor.is_floating_point()
            else tensor
            for tensor in inputs.tensors
        )
        outputs = as_tuple(formula(*wide))
        of = [tensor for tensor in wide if tensor.requires_grad]
        gradients = torch.autograd.grad(outputs, of, [grad.double() for grad in inputs.grads])
        return Exact(tuple(out.detach() for out in outputs), gradients=gradients)

    return exact


def copies(case: Case, num_sets: int) -> Prepared:
    """A copy kernel over as many bytes: half of them read, half of them written.

    An elementwise kernel and no memcpy, which is slower inside of a CUDA graph.
    """

    def of(name: str) -> tuple[Call, ...]:
        numel = case.parameter(name) // 8
        # No zeros: memory moves them faster than values.
        pairs = [torch.randn(2, numel, device=case.device) for _ in range(num_sets)]
        return tuple(_copying(*pair) for pair in pairs)

    return Prepared(of("forward_bytes"), both=of("forward_backward_bytes"))


def _copying(source: Tensor, target: Tensor) -> Call:
    return lambda: torch.neg(source, out=target)
