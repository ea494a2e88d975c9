"""The dtype changes that a plan asks for: of weights, and of what belongs to them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, cast

import attrs
import torch
from torch.optim import Optimizer

from automodel_fn.cast._convert import converted, converted_views
from automodel_fn.cast._entries import TensorCast
from automodel_fn.cast._exchange import Exchange
from automodel_fn.cast._tensors import ModelScan, NamedTensor
from automodel_fn.dtypes import dtype_name, is_wider

_TORCHS_FUNCTIONS: tuple[Any, ...] = (
    cast(Any, torch.Tensor).__torch_function__.__func__,
    cast(Any, torch.nn.Parameter).__torch_function__,
)
_LARGE = 8 << 20
"""Bytes from which on a tensor is worth a conversion of its own, and batches are not larger."""
_MIN_PARTS = 64
"""Into how many batches a model is divided at least, where its tensors are smaller than that."""


@attrs.frozen
class Conversion:
    """A dtype change of tensors: of weights, or of gradients and optimizer state.

    Args:
        names: For each tensor what it is, for messages.
        owners: For each the canonical FQN of the weight that it is, or belongs to.
        tensors: The tensors, on one device.
        from_dtype: Their dtype before.
        to_dtype: Their dtype afterwards.
        is_weight: Whether they are parameters or buffers, not what belongs to one.
        is_one_storage: Whether they are views of one storage, and stay so.
    """

    names: tuple[str, ...]
    owners: tuple[str, ...] = attrs.field(kw_only=True)
    tensors: tuple[torch.Tensor, ...] = attrs.field(kw_only=True, eq=False, repr=False)
    from_dtype: torch.dtype = attrs.field(kw_only=True)
    to_dtype: torch.dtype = attrs.field(kw_only=True)
    is_weight: bool = attrs.field(kw_only=True)
    is_one_storage: bool = attrs.field(default=False, kw_only=True)

    def made(self) -> tuple[torch.Tensor, ...]:
        """The tensors in their new dtype."""
        return self.made_of(self.tensors)

    def made_of(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """What the conversion makes of tensors like its own."""
        convert = converted_views if self.is_one_storage else converted
        return convert(tensors, self.to_dtype)

    def parts(self) -> tuple[Conversion, ...]:
        """The same, one storage at a time."""
        if self.is_one_storage:
            return (self,)
        return tuple(
            attrs.evolve(self, names=(name,), owners=(owner,), tensors=(tensor,))
            for name, owner, tensor in zip(self.names, self.owners, self.tensors, strict=True)
        )

    def exchange(self) -> Exchange:
        """The exchange that carries it out."""
        sizes = [tensor.nbytes for tensor in self.tensors]
        largest = sum(sizes) if self.is_one_storage else max(sizes)
        return Exchange(
            self.names,
            tensors=self.tensors,
            make=self.made,
            num_bytes=largest // self.from_dtype.itemsize * self.to_dtype.itemsize,
            can_finish=not is_wider(self.to_dtype, self.from_dtype)
            and all(_has_torchs_functions(tensor) for tensor in self.tensors),
            parts=lambda: tuple(part.exchange() for part in self.parts()),
        )


def each_with_data(
    conversions: Sequence[Conversion], data: Sequence[tuple[torch.Tensor, ...]]
) -> Iterator[tuple[Conversion, tuple[torch.Tensor, ...]]]:
    """Conversions of one storage each, with the data that a run of them all gave for it."""
    for conversion, tensors in zip(conversions, data, strict=True):
        if conversion.is_one_storage:
            yield conversion, tensors
        else:
            yield from zip(conversion.parts(), ((tensor,) for tensor in tensors), strict=True)


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
        if not optimizers and gradient_of(tensor) is None:
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
        is_ordinary = _has_torchs_functions(tensor)
        kind = (entry.from_dtype, entry.to_dtype, tensor.device, name == "", is_ordinary)
        batch = self._open[kind]
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


def _has_torchs_functions(tensor: torch.Tensor) -> bool:
    """Whether no subclass has a word in its conversion, and could refuse it again and again."""
    function: Any = type(tensor).__torch_function__
    return getattr(function, "__func__", function) in _TORCHS_FUNCTIONS


def gradient_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The gradient that a tensor holds; one that an operation made may hold none, and warns."""
    return tensor.grad if tensor.is_leaf or tensor.retains_grad else None


def dry_run(conversions: Sequence[Conversion]) -> None:
    """Cast one element of each kind, so that what cannot be cast fails before anything changes."""
    kinds: dict[tuple[Any, ...], torch.Tensor] = {}
    for c in conversions:
        for kind, tensor in {type(tensor): tensor for tensor in c.tensors}.items():
            kinds[kind, c.from_dtype, c.to_dtype, tensor.device] = tensor
    for (kind, from_dtype, to_dtype, _), tensor in kinds.items():
        try:
            tensor.detach().new_empty(1).to(to_dtype)
        except Exception as error:
            error.add_note(
                f"while trying one element of {kind.__name__}, {dtype_name(from_dtype)} to "
                f"{dtype_name(to_dtype)}; the model was not changed."
            )
            raise
