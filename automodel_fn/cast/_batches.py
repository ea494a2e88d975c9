"""How a plan's tensors are converted: what is alike together, in steps that take little memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from operator import attrgetter, itemgetter
from typing import Any

import attrs
import torch
from torch.optim import Optimizer

from automodel_fn.cast._conversions import Conversion, gradient_of, num_values
from automodel_fn.cast._convert import LARGE, bytes_of_views
from automodel_fn.cast._entries import TensorCast
from automodel_fn.cast._steps import ends_of_steps, limit_of_steps
from automodel_fn.cast._tensors import NamedTensor

_COUNTERS = {"step", "mu_product", "eta", "mu"}
"""State of PyTorch's optimizers that is a scalar whatever the parameter, and float32."""
_is_leaf, _grad = attrgetter("is_leaf"), attrgetter("grad")


@attrs.frozen
class Batch:
    """A `Conversion` of weights, by their places in a model instead of tensors.

    Args:
        names: Their canonical FQNs.
        places: Their places among the tensors of the model.
        from_dtype: Their dtype before.
        to_dtype: Their dtype afterwards.
        ends: Where each step ends.
        num_bytes: What converting the largest takes; or all of them, if they are one storage.
        is_one_storage: Whether they are views of one storage.
    """

    names: tuple[str, ...]
    places: tuple[int, ...] = attrs.field(kw_only=True)
    from_dtype: torch.dtype = attrs.field(kw_only=True)
    to_dtype: torch.dtype = attrs.field(kw_only=True)
    ends: tuple[int, ...] = attrs.field(kw_only=True)
    num_bytes: int = attrs.field(kw_only=True)
    is_one_storage: bool = attrs.field(default=False, kw_only=True)

    def conversion(self, tensors: Sequence[torch.Tensor]) -> Conversion:
        """That of the tensors of a model."""
        return Conversion(
            self.names,
            owners=self.names,
            tensors=picked(tensors, self.places),
            from_dtype=self.from_dtype,
            to_dtype=self.to_dtype,
            ends=self.ends,
            num_bytes=self.num_bytes,
            is_weight=True,
            is_one_storage=self.is_one_storage,
        )


def picked(items: Sequence[Any], places: Sequence[int]) -> tuple[Any, ...]:
    """The items at some places.

    Example:
        >>> picked("abc", (2, 0)), picked("abc", (1,)), picked("abc", ())
        (('c', 'a'), ('b',), ())
    """
    if len(places) < 2:
        return tuple(items[place] for place in places)
    return itemgetter(*places)(items)


def batches_of(
    entries: Sequence[TensorCast],
    tensors: Sequence[NamedTensor],
    groups: Sequence[Sequence[int]],
) -> tuple[Batch, ...]:
    """How the weights are converted that the entries change.

    Args:
        entries: A plan's entries.
        tensors: The tensors of the model that they fit.
        groups: The places of those that are views of one storage.
    """
    planned = _planned(entries, tensors)
    grouped = {place: group for group in groups for place in group}
    sizes = [entry.bytes_after for _, entry in planned]
    limit = limit_of_steps(sizes)
    storages: list[Batch] = []
    gathered: defaultdict[Any, list[tuple[str, int, int]]] = defaultdict(list)
    for (place, entry), size in zip(planned, sizes, strict=True):
        group = grouped.get(place)
        if group is None:
            key = _key(tensors[place].tensor, entry.to_dtype, size)
            gathered[key].append((entry.names[0], place, size))
        elif place == group[0]:
            storages.append(_of_one_storage([tensors[i] for i in group], group, entry))
    batches: list[Batch] = []
    for (_, to_dtype, *_), members in gathered.items():
        names, places, found = zip(*members, strict=True)
        tensor = tensors[places[0]].tensor
        ends = ends_of_steps(found, limit, tensor, to_dtype)
        batches.append(
            Batch(
                names,
                places=places,
                from_dtype=tensor.dtype,
                to_dtype=to_dtype,
                ends=ends,
                num_bytes=max(found),
            )
        )
    return (*storages, *batches)


def _of_one_storage(
    members: Sequence[NamedTensor], places: Sequence[int], entry: TensorCast
) -> Batch:
    return Batch(
        tuple(item.names[0] for item in members),
        places=tuple(places),
        from_dtype=entry.from_dtype,
        to_dtype=entry.to_dtype,
        ends=(len(places),),
        num_bytes=bytes_of_views([item.tensor for item in members], entry.to_dtype),
        is_one_storage=True,
    )


def conversions_of(
    batches: Iterable[Batch],
    tensors: Sequence[torch.Tensor],
    optimizers: Sequence[Optimizer] = (),
) -> tuple[Conversion, ...]:
    """Every dtype change that a plan asks for: of weights, and of what belongs to them.

    Args:
        batches: How the weights are converted.
        tensors: The tensors of the model.
        optimizers: Those whose state is converted along.
    """
    weights = tuple(batch.conversion(tensors) for batch in batches)
    if not optimizers and not any(_may_have_gradients(weight.tensors) for weight in weights):
        return weights
    return (*weights, *_of_belongings(weights, tensors, optimizers))


def _may_have_gradients(tensors: Sequence[torch.Tensor]) -> bool:
    return not all(map(_is_leaf, tensors)) or any(g is not None for g in map(_grad, tensors))


def _of_belongings(
    weights: Sequence[Conversion],
    tensors: Sequence[torch.Tensor],
    optimizers: Sequence[Optimizer],
) -> Iterator[Conversion]:
    """Of gradients and optimizer state, each once; one of the model is cast by its own entry."""
    known = set(map(id, tensors))
    gathered: defaultdict[Any, list[tuple[str, str, torch.Tensor, int]]] = defaultdict(list)
    for weight in weights:
        for owner, tensor in zip(weight.names, weight.tensors, strict=True):
            for name, belonging in _belongings(owner, tensor, weight.from_dtype, optimizers):
                if id(belonging) not in known:
                    known.add(id(belonging))
                    size = num_values(belonging) * weight.to_dtype.itemsize
                    key = _key(belonging, weight.to_dtype, size)
                    gathered[key].append((name, owner, belonging, size))
    limit = limit_of_steps([size for members in gathered.values() for *_, size in members])
    for (_, to_dtype, *_), members in gathered.items():
        names, owners, found, sizes = zip(*members, strict=True)
        yield Conversion(
            names,
            owners=owners,
            tensors=found,
            from_dtype=found[0].dtype,
            to_dtype=to_dtype,
            ends=ends_of_steps(sizes, limit, found[0], to_dtype),
            num_bytes=max(sizes),
            is_weight=False,
        )


def _belongings(
    name: str, tensor: torch.Tensor, dtype: torch.dtype, optimizers: Sequence[Optimizer]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor's gradient, and its optimizer state of its own shape and dtype; no step counters."""
    grad = gradient_of(tensor)
    if grad is not None and grad.dtype == dtype:
        yield f"{name}.grad", grad
    for optimizer in optimizers:
        for key, value in optimizer.state.get(tensor, {}).items():
            is_alike = isinstance(value, torch.Tensor) and value.shape == tensor.shape
            if is_alike and key not in _COUNTERS and value.dtype == dtype:
                yield f"{name} ({key})", value


def _planned(
    entries: Sequence[TensorCast], tensors: Sequence[NamedTensor]
) -> list[tuple[int, TensorCast]]:
    """What changes: the place of the tensor, and its entry."""
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


def _key(tensor: torch.Tensor, to_dtype: torch.dtype, size: int) -> tuple[Any, ...]:
    """What tensors have in common that are converted together."""
    kind = type(tensor), tensor.layout
    return kind, to_dtype, tensor.dtype, tensor.device, size >= LARGE
