"""Whether a tensor has memory: what kernels need, and shape inference lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.compiler import is_compiling
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

_PLAIN = (torch.Tensor, torch.nn.Parameter)
_c: Any = torch._C
_ordinary_dispatch = _c._disabled_torch_dispatch_impl


def is_tensor_unallocated(tensor: torch.Tensor) -> bool:
    """Whether there is no memory behind a tensor, so that no kernel can read it.

    True for meta tensors, fake tensors, uninitialized parameters, and tensors whose storage was
    freed (as FSDP2 does between uses). A wrapper (DTensor, a nested tensor, the tensors inside
    `torch.func` transforms) is judged by what it wraps. An empty tensor is allocated: there is
    nothing to read, and every kernel may. While a graph is recorded (`torch.compile`,
    `torch.export`, `make_fx`) a fake tensor stands for a real one and counts as allocated.

    Args:
        tensor: Any tensor, of any shape and dtype.

    Source:
        `is_tensor_unallocated` (NeMo Automodel), which asks whether the address or the size is 0
        and so takes every DTensor, nested, batched and empty tensor for unallocated.

    Example:
        >>> [is_tensor_unallocated(x) for x in (torch.ones(2, device="meta"), torch.ones(0))]
        [True, False]
    """
    return _is_any(tensor, _has_no_memory)


def is_tensor_abstract(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a shape and a dtype, and no values by its nature: meta or fake.

    What was freed is none: it had values, and whoever reads it now has made a mistake.

    Args:
        tensor: Any tensor; a wrapper is judged by what it wraps, as in `is_tensor_unallocated`.

    Example:
        >>> is_tensor_abstract(torch.ones(2, device="meta"))
        True
    """
    return _is_any(tensor, _has_no_values)


def _is_any(tensor: torch.Tensor, answer: Callable[[torch.Tensor], bool]) -> bool:
    """The answer for a tensor, or for any of those that it wraps."""
    if is_compiling() or _is_graph_recorded():
        return tensor.device.type == "meta"
    if type(tensor) not in _PLAIN and is_traceable_wrapper_subclass(tensor):
        names, _ = tensor.__tensor_flatten__()
        inner = (getattr(tensor, name) for name in names)
        return any(_is_any(item, answer) for item in inner if isinstance(item, torch.Tensor))
    if _c._functorch.is_functorch_wrapped_tensor(tensor):
        return _is_any(_c._functorch.get_unwrapped(tensor), answer)
    return answer(tensor)


def _has_no_values(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or isinstance(tensor, FakeTensor)


def _has_no_memory(tensor: torch.Tensor) -> bool:
    if _has_no_values(tensor) or is_lazy(tensor):
        return True
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.numel() == 0:
        return False
    # Not the address: reading it copies what is copied on write, and a view's is never 0.
    return _has_own_storage(tensor) and tensor.untyped_storage().nbytes() == 0


def _has_own_storage(tensor: torch.Tensor) -> bool:
    """Whether the storage is the tensor's memory.

    A type that dispatches for itself may have it elsewhere; the zeros of forward mode need none.
    """
    kind: Any = type(tensor)
    return kind.__torch_dispatch__ is _ordinary_dispatch and not tensor._is_zerotensor()


def _is_graph_recorded() -> bool:
    key = _c._TorchDispatchModeKey.PROXY
    return (
        _c._get_dispatch_mode(key) is not None
        or torch._ops._get_dispatch_mode_pre_dispatch(key) is not None
    )
