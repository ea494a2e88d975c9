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
    """A copy with the same ties, views of one storage, strides, bits and gradients.

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
    storages: dict[int, torch.UntypedStorage] = {}
    memo: dict[int, object] = {}
    for _, tensor in tensors_of(model):
        if id(tensor) not in memo and is_plain(tensor):
            memo[id(tensor)] = _twin_tensor(tensor, storages, device)
    return copy.deepcopy(model, memo)


def _twin_tensor(
    tensor: torch.Tensor, storages: dict[int, torch.UntypedStorage], device: str | None
) -> torch.Tensor:
    place = torch.device(device) if device else tensor.device
    key = storage_key(tensor)
    if key not in storages:
        source = tensor.untyped_storage()
        if place.type == "meta":
            storages[key] = torch.UntypedStorage(source.nbytes(), device="meta")
        else:
            storages[key] = source.clone()
    data = torch.empty(0, dtype=tensor.dtype, device=place).set_(
        storages[key], tensor.storage_offset(), tensor.shape, tensor.stride()
    )
    fresh = torch.Tensor._make_subclass(type(tensor), data, tensor.requires_grad)
    vars(fresh).update(vars(tensor))
    if tensor.grad is not None:
        fresh.grad = _twin_tensor(tensor.grad, storages, device)
    return fresh
