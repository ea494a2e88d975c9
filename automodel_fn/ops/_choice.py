"""Which implementation of an operation runs, as data."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Literal

import attrs
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.distributed.tensor import DTensor


@attrs.frozen
class KernelChoice:
    """What computes an operation for given inputs, and why.

    Args:
        name: "triton" (a fused kernel of this package) or "torch" (torch's own operators).
        reason: Why this one, such as "x is on cpu".

    Example:
        >>> KernelChoice("torch", reason="x is on cpu").name
        'torch'
    """

    name: Literal["triton", "torch"]
    reason: str = attrs.field(kw_only=True)


_TRITON = KernelChoice("triton", reason="all tensors are on CUDA, in bf16, fp16 or fp32")
_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))
# The types of tensors that are their memory, but within a transform of `torch.func`.
PLAIN = (Tensor, nn.Parameter)
# What compilers trace with, in a forward and in its backward, and what has shards of its own.
_STAND_FOR_PLAIN = (FakeTensor, FunctionalTensor, DTensor)
# Whether a tensor stands for another one in a transform of `torch.func`, or did in one that ended.
is_wrapper: Callable[[Tensor], bool] = torch._C._functorch.is_functorch_wrapped_tensor  # pyright: ignore[reportAttributeAccessIssue]
# Elements from which less memory traffic on a CPU is worth more than fewer calls.
_WORTH_LESS_MEMORY = 2**17


def kernel_choice(**tensors: Tensor | None) -> KernelChoice:
    """What computes an operation of these tensors, as far as their kinds say.

    Kernels take plain tensors of one CUDA device, in bf16, fp16 or fp32; of a DTensor its shard.

    Example:
        >>> kernel_choice(x=torch.ones(2), weight=None)
        KernelChoice(name='torch', reason='x is on cpu')
    """
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not tensor.is_cuda:
            return KernelChoice("torch", reason=f"{name} is on {tensor.device.type}")
        if tensor.dtype not in _DTYPES:
            return KernelChoice("torch", reason=f"{name} is {tensor.dtype}")
        if not is_plain(tensor) and not isinstance(tensor, _STAND_FOR_PLAIN):
            return KernelChoice("torch", reason=f"{name} is {_kind(tensor)}")
        if device is not None and tensor.device != device:
            reason = f"{name} is on {tensor.device}, not on {device}"
            return KernelChoice("torch", reason=reason)
        device = tensor.device
    if not has_triton():
        return KernelChoice("torch", reason="Triton is not installed")
    return _TRITON


def is_plain(tensor: Tensor) -> bool:
    """Whether it is its memory: no subclass, and not within a transform of `torch.func`.

    Example:
        >>> is_plain(torch.ones(2)), is_plain(nn.Parameter(torch.ones(2)))
        (True, True)
    """
    return type(tensor) in PLAIN and not is_wrapper(tensor)


def is_watched() -> bool:
    """Whether a `TorchDispatchMode` sees the operators that are called.

    Then an operation has to be one of them: a kernel that is launched would not be seen.

    Example:
        >>> is_watched()
        False
    """
    return torch._C._len_torch_dispatch_stack() > 0


def is_transformed() -> bool:
    """Whether a transform of `torch.func` is at work, as `vmap`.

    Example:
        >>> is_transformed()
        False
    """
    return torch._C._are_functorch_transforms_active()


def is_direct(*tensors: Tensor | None) -> bool:
    """Whether an operation may compute on the memory of these, without an operator of its own.

    Not where somebody watches, and not where any of them is no plain tensor: what has shards, say,
    has no memory that a kernel could read, and torch refuses to mix it with plain ones.

    Example:
        >>> is_direct(torch.ones(2), None)
        True
    """
    if is_watched():
        return False
    # Generators would cost more than all that they look at, here and below.
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and not is_plain(tensor):
            return False
    return True


def needs_gradients(*tensors: Tensor | None) -> bool:
    """Whether autograd records what is computed of them.

    Example:
        >>> needs_gradients(torch.ones(2), torch.ones(2, requires_grad=True), None)
        True
    """
    if not torch.is_grad_enabled():
        return False
    for tensor in tensors:  # noqa: SIM110
        if tensor is not None and tensor.requires_grad:
            return True
    return False


def is_worth_less_memory(tensor: Tensor) -> bool:
    """Whether it is so large that on a CPU operators in place are quicker than fewer operators.

    Example:
        >>> is_worth_less_memory(torch.ones(64, 128))
        False
    """
    return tensor.numel() >= _WORTH_LESS_MEMORY


def is_exporting() -> bool:
    """Whether `torch.export` traces: a program must not depend on operators of this package.

    Example:
        >>> is_exporting()
        False
    """
    # Not torch.compiler.is_exporting: traced by torch 2.11, that is True in every compilation.
    return getattr(torch.compiler, "_is_exporting_flag", False)


def _kind(tensor: Tensor) -> str:
    name = type(tensor).__name__
    return "in a transform of torch.func" if type(tensor) in PLAIN else f"of the type {name}"


@cache
def has_triton() -> bool:
    """Whether Triton is installed; it is not imported."""
    return find_spec("triton") is not None
