"""A copy of a model that shares memory wherever the model does; `copy.deepcopy` does not."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch import nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor's data is its own dense storage, and no subclass decides otherwise."""
    kind: Any = type(tensor)
    is_ordinary = kind.__torch_dispatch__ is cast(Any, torch.Tensor).__torch_dispatch__
    return is_ordinary and tensor.layout is torch.strided and not tensor.is_quantized


def storage_key(tensor: torch.Tensor) -> int:
    """Equal for two living tensors if and only if they are views of one storage."""
    return tensor.untyped_storage()._cdata


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor in logical order, in memory of their own.

    Example:
        >>> bits_of(torch.tensor([1.0])).tolist()
        [0, 0, 128, 63]
    """
    plain = tensor.detach()
    if plain.is_complex():
        plain = torch.view_as_real(plain)
    flat = plain.clone(memory_format=torch.contiguous_format).reshape(-1)
    return flat.view(torch.uint8)


def tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Every name with its tensor, ties under each of their names, wrappers spelled out.

    Not by `named_parameters`: some wrappers leave their own name out there.

    Example:
        >>> [name for name, _ in tensors_of(nn.Sequential(nn.Linear(1, 1)))]
        ['0.weight', '0.bias']
    """
    for held in (model._parameters, model._buffers):
        yield from ((name, tensor) for name, tensor in held.items() if tensor is not None)
    for key, child in model._modules.items():
        if child is not None:
            yield from ((f"{key}.{name}", tensor) for name, tensor in tensors_of(child))


def twin_of(model: ModuleT, device: str | None = None) -> ModuleT:
    """A copy with the same ties, views of one storage, strides, bits, gradients and hooks.

    Tensors of a subclass with a representation of its own are copied as `copy.deepcopy` does it.

    Args:
        model: The model; it is not changed.
        device: "meta" for a copy without data; None for the tensors' own devices.

    Example:
        >>> flat = torch.arange(4.0)
        >>> model = nn.ParameterList([flat[:3], flat[1:]])
        >>> first, second = twin_of(model)
        >>> storage_key(first) == storage_key(second) != storage_key(flat)
        True
    """
    twins = _Twins(device)
    memo: dict[int, object] = {}
    for _, tensor in tensors_of(model):
        if is_plain(tensor):
            memo[id(tensor)] = twins.of(tensor)
    return copy.deepcopy(model, memo)


class _Twins:
    """Twins of tensors: one each, on one new storage for each of theirs."""

    def __init__(self, device: str | None) -> None:
        self._device = device
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._known: dict[int, torch.Tensor] = {}

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in self._known:
            self._known[id(tensor)] = self._made(tensor)
        return self._known[id(tensor)]

    def _made(self, tensor: torch.Tensor) -> torch.Tensor:
        place = torch.device(self._device) if self._device else tensor.device
        data = torch.empty(0, dtype=tensor.dtype, device=place).set_(
            self._storage(tensor, place), tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        fresh = torch.Tensor._make_subclass(type(tensor), data, tensor.requires_grad)
        vars(fresh).update(vars(tensor))
        for hook in (tensor._backward_hooks or {}).values():
            fresh.register_hook(hook)
        for hook in (tensor._post_accumulate_grad_hooks or {}).values():
            fresh.register_post_accumulate_grad_hook(hook)
        if tensor.grad is not None:
            fresh.grad = self.of(tensor.grad)
        return fresh

    def _storage(self, tensor: torch.Tensor, place: torch.device) -> torch.UntypedStorage:
        key, source = storage_key(tensor), tensor.untyped_storage()
        if key not in self._storages:
            is_meta = place.type == "meta"
            self._storages[key] = (
                torch.UntypedStorage(source.nbytes(), device="meta") if is_meta else source.clone()
            )
        return self._storages[key]
