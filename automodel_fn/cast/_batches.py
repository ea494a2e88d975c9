"""The conversions that a plan asks for: large tensors one by one, small ones many at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch.optim import Optimizer

from automodel_fn.cast._conversions import Conversion, gradient_of
from automodel_fn.cast._entries import TensorCast
from automodel_fn.cast._tensors import ModelScan, NamedTensor

_LARGE = 8 << 20
"""Bytes from which on a tensor is worth a conversion of its own, and batches are not larger."""
_MIN_PARTS = 64
"""Into how many batches a model is divided at least, where its tensors are smaller than that."""


def conversions_of(
    entries: Sequence[TensorCast],
    model_scan: ModelScan,
    groups: Sequence[Sequence[int]],
    optimizers: Sequence[Optimizer] = (),
) -> tuple[Conversion, ...]:
    """Every dtype change that the entries ask for: of weights, and of what belongs to them.

    Small tensors are converted many at once, as long as they take no more memory than the largest
    single one, or than a small part of the model.

    Args:
        entries: A plan's entries.
        model_scan: The model that they fit.
        groups: The indices of its tensors that are views of one storage.
        optimizers: Those whose state is converted along.
    """
    tensors = model_scan.tensors
    planned = _planned(entries, tensors)
    grouped = {index: group for group in groups for index in group}
    sizes = [entry.bytes_after for _, entry in planned]
    batches = _Batches(sizes)
    known: set[int] = set()
    for (index, entry), size in zip(planned, sizes, strict=True):
        tensor = tensors[index].tensor
        group = grouped.get(index)
        if group is None:
            batches.add(entry, tensor, size)
        elif index == group[0]:
            batches.add_group(entry, [tensors[member] for member in group])
        if not optimizers and tensor.is_leaf and tensor.grad is None:
            continue
        # One of several tensors is cast once, and one of the model by its own entry.
        known = known or {id(item.tensor) for item in tensors}
        for name, belonging in _belongings(tensor, entry, optimizers):
            if id(belonging) not in known:
                known.add(id(belonging))
                batches.add(entry, belonging, size, name)
    return batches.all()


def _planned(
    entries: Sequence[TensorCast], tensors: Sequence[NamedTensor]
) -> list[tuple[int, TensorCast]]:
    """What changes: the index of the tensor, and its entry."""
    if [entry.names for entry in entries] == [item.names for item in tensors]:
        places = range(len(tensors))
    else:
        named = {name: index for index, item in enumerate(tensors) for name in item.names}
        places = [named[entry.name] for entry in entries]
    return [
        (place, entry)
        for place, entry in zip(places, entries, strict=True)
        if entry.from_dtype is not entry.to_dtype
    ]


class _Batches:
    """Tensors gathered into conversions: large ones alone, small ones up to a limit."""

    def __init__(self, sizes: Sequence[int]) -> None:
        self._limit = min(_LARGE, max(max(sizes, default=0), sum(sizes) // _MIN_PARTS))
        self._full: list[Conversion] = []
        self._open: defaultdict[Any, _Batch] = defaultdict(_Batch)

    def add(self, entry: TensorCast, tensor: torch.Tensor, num_bytes: int, name: str = "") -> None:
        """Add a weight, or under a name of its own what belongs to it."""
        key = entry.from_dtype, entry.to_dtype, tensor.device, type(tensor), name == ""
        batch = self._open[key]
        if batch.num_bytes + num_bytes > self._limit and batch.parts:
            self._full.append(batch.conversion())
            batch.clear()
        batch.parts.append((name or entry.names[0], entry, tensor))
        batch.num_bytes += num_bytes

    def add_group(self, entry: TensorCast, items: Sequence[NamedTensor]) -> None:
        """Add weights that are views of one storage."""
        batch = _Batch()
        batch.parts = [(item.names[0], entry, item.tensor) for item in items]
        made = batch.conversion()
        self._full.append(
            attrs.evolve(made, owners=made.names, is_weight=True, is_one_storage=True)
        )

    def all(self) -> tuple[Conversion, ...]:
        return (*self._full, *(batch.conversion() for batch in self._open.values()))


class _Batch:
    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.parts: list[tuple[str, TensorCast, torch.Tensor]] = []
        self.num_bytes = 0

    def conversion(self) -> Conversion:
        names, entries, tensors = zip(*self.parts, strict=True)
        owners = tuple([entry.names[0] for entry in entries])
        return Conversion(
            names,
            owners=owners,
            tensors=tensors,
            from_dtype=entries[0].from_dtype,
            to_dtype=entries[0].to_dtype,
            is_weight=names == owners,
        )


def _belongings(
    tensor: torch.Tensor, entry: TensorCast, optimizers: Sequence[Optimizer]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor's gradient, and its optimizer state of its own shape and dtype; no step counters."""
    grad = gradient_of(tensor)
    if grad is not None and grad.dtype == entry.from_dtype:
        yield f"{entry.name}.grad", grad
    for optimizer in optimizers:
        for key, value in optimizer.state.get(tensor, {}).items():
            is_alike = isinstance(value, torch.Tensor) and value.shape == tensor.shape
            if is_alike and key != "step" and value.dtype == entry.from_dtype:
                yield f"{entry.name} ({key})", value
