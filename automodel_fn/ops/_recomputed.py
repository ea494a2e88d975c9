"""SwiGLU whose product is computed again in the backward, in place of being kept for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from automodel_fn.ops._choice import is_direct
from automodel_fn.ops._swiglu import swiglu

T = TypeVar("T")


def recomputed_swiglu(function: Callable[[Tensor], T], gate: Tensor, up: Tensor) -> T:
    """`function(swiglu(gate, up))`, of which autograd keeps `gate` and `up` and not the product.

    What `function` saves of the product for its gradients, as a linear layer does for that of its
    weight, is computed again when they are: the same bits, for one more run of the kernel. `gate`
    and `up` are kept anyway, for the gradients of the product itself.

    Where saved tensors are somebody else's business, as under activation checkpointing, while
    `torch.compile` traces, and of subclasses such as DTensor, `function` keeps what it wants to.

    Args:
        function: What takes the product `[..., F]`, as the last projection of an MLP.
        gate: `[..., F]`, floating point.
        up: `[..., F]`, in the shape and the dtype of `gate`.

    Returns:
        What `function` returns.

    Raises:
        ConfigError: As `swiglu`.
        RuntimeError: In the backward, if `gate` or `up` was changed in place since.

    Source:
        Chen et al., "Training Deep Nets with Sublinear Memory Cost" (2016).

    Example:
        >>> layer = torch.nn.Linear(2, 1)
        >>> gate, up = torch.ones(1, 2, requires_grad=True), torch.ones(1, 2)
        >>> recomputed_swiglu(layer, gate, up).sum().backward()
        >>> layer.weight.grad
        tensor([[0.7311, 0.7311]])
    """
    product = swiglu(gate, up)
    # Of what needs no gradient neither gate nor up is kept.
    if torch.compiler.is_compiling() or not product.requires_grad:
        return function(product)
    if _is_hooked() or not is_direct(product):
        return function(product)
    again = _Again(gate, up, product)
    with torch.autograd.graph.saved_tensors_hooks(again.pack, again.unpack):
        return function(product)


def _is_hooked() -> bool:
    autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
    return autograd._top_saved_tensors_default_hooks(True) is not None


class _Again:
    """What the product is computed of, and how to know the product."""

    def __init__(self, gate: Tensor, up: Tensor, product: Tensor) -> None:
        self._gate, self._up = gate.detach(), up.detach()
        self._versions = gate._version, up._version
        self._memory = product.untyped_storage().data_ptr()
        self._dtype, self._version = product.dtype, product._version

    def pack(self, tensor: Tensor) -> Any:
        is_product = (
            type(tensor) is Tensor
            and tensor.layout == torch.strided
            and tensor.dtype == self._dtype
            and tensor._version == self._version
            and tensor.untyped_storage().data_ptr() == self._memory
        )
        if not is_product:
            return tensor
        return tensor.shape, tensor.stride(), tensor.storage_offset()

    def unpack(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        if (self._gate._version, self._up._version) != self._versions:
            raise RuntimeError(
                "the gate or the up that swiglu was computed of was changed in place before its "
                "product was computed again for the backward; keep them, or use swiglu='fused'."
            )
        # Both are detached: nothing of this is recorded.
        return swiglu(self._gate, self._up).as_strided(*kept)
