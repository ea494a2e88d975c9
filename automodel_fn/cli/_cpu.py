"""Matrix products of bf16 and fp16 on a CPU that has no instructions for them.

There PyTorch's own kernels are plain loops: on two AVX2 cores a 512 x 512 x 192 product took 0.6 ms
in float32 and 40 ms in bfloat16. Computing it in float32 and rounding the result gives what the
narrow kernel is meant to give (products are exact, sums are float32), at the speed of float32.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from automodel_fn.dtypes import dtype_name

_NARROW = (torch.bfloat16, torch.float16)
_PRODUCTS = frozenset({"aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm"})


class NarrowProductsInFloat32(TorchDispatchMode):
    """Inside, matrix products of narrow floats on the CPU are computed in float32 and rounded."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run one operator."""
        kwargs = kwargs or {}
        schema: Any = func._schema  # pyright: ignore[reportFunctionMemberAccess]
        if schema.name not in _PRODUCTS or not _is_narrow_on_cpu(args[0]):
            return func(*args, **kwargs)
        dtype = args[0].dtype
        return func(*tree_map_only(torch.Tensor, torch.Tensor.float, args), **kwargs).to(dtype)


def _is_narrow_on_cpu(tensor: torch.Tensor) -> bool:
    return tensor.dtype in _NARROW and tensor.device.type == "cpu"


def products_in_float32(
    dtype: torch.dtype, remark: Callable[[str], None]
) -> contextlib.AbstractContextManager[Any]:
    """That mode if this machine needs it, and a remark that says so; else a context of nothing."""
    capability = torch.backends.cpu.get_cpu_capability()
    if torch.cuda.is_available() or dtype not in _NARROW or "AVX512" in capability:
        return contextlib.nullcontext()
    remark(
        f"this CPU ({capability}) has no fast {dtype_name(dtype)} matrix products: they are "
        f"computed in float32 and rounded to {dtype_name(dtype)}"
    )
    return NarrowProductsInFloat32()
