"""Whether any of several weights has changed since: a question that every forward asks.

As comparing stamps (see `_freshness`), in a few steps and in one function for all of them: where
other work has emptied the processor's caches, each function and object more costs most of all.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from automodel_fn.step._freshness import counts, invalidations, watch_optimizers, weight_stamp

Place = tuple[dict[str, Any], str]
"""Where a weight is looked up: a module's `_parameters`, and a name."""


class WeightsWatch:
    """Tells whether the weights in some places are still as they were at the last `take`.

    Refers to weights by their identity and to their storages weakly: it keeps none of them alive.

    Args:
        places: Where the weights are; another one in its place is a change.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> watch = WeightsWatch([(layer._parameters, "weight")])
        >>> watch.take()
        >>> watch.are_same()
        True
        >>> layer.weight.data = torch.ones(2, 2)
        >>> watch.are_same(), watch.changed()
        (False, ['weight'])
    """

    __slots__ = ("_are_ordinary", "_events", "_optimizer_steps", "_rows", "places")

    def __init__(self, places: Iterable[Place]) -> None:
        self.places = tuple(places)
        self._rows: tuple[tuple[Any, ...], ...] = ()
        self._optimizer_steps = self._events = -1
        self._are_ordinary = False

    def take(self) -> None:
        """From now on the weights as they are now are those to compare with.

        Raises:
            KeyError: A place is empty.
        """
        watch_optimizers()
        self._optimizer_steps, self._events = counts.optimizer_steps, counts.events
        self._are_ordinary = all(_is_ordinary(weights[name]) for weights, name in self.places)
        self._rows = tuple(_row(weights, name) for weights, name in self.places)

    def are_same(self) -> bool:
        """Whether no weight has changed since."""
        if self._events != counts.events or not self._are_ordinary:
            if self.changed():
                return False
            self._events = counts.events
            return True
        try:
            for (
                weights,
                name,
                identity,
                version,
                storage,
                shape,
                stride,
                offset,
                dtype,
                _,
            ) in self._rows:
                weight = weights[name]
                if (
                    id(weight) != identity
                    or weight._version != version
                    or weight.untyped_storage() is not storage()
                    or weight.shape != shape
                    or weight.stride() != stride
                    or weight.storage_offset() != offset
                    or weight.dtype is not dtype
                ):
                    return False
        except (KeyError, NotImplementedError):
            return False  # the place is empty, or what was swapped in has no storage
        return True

    def changed(self) -> list[str]:
        """The names of the weights that have changed since."""
        if self._optimizer_steps != counts.optimizer_steps:
            return [name for _, name in self.places]
        return [
            name
            for (weights, name), row in zip(self.places, self._rows, strict=True)
            if name not in weights or _row(weights, name) != row
        ]


def _row(weights: dict[str, Any], name: str) -> tuple[Any, ...]:
    weight = weights[name]
    if not _is_ordinary(weight):
        return weights, name, id(weight), weight_stamp(weight)
    return (
        weights,
        name,
        id(weight),
        weight._version,
        # A storage has one Python object, from the first time that it is asked for until it goes.
        weakref.ref(weight.untyped_storage()),
        weight.shape,
        weight.stride(),
        weight.storage_offset(),
        weight.dtype,
        invalidations(weight),
    )


def _is_ordinary(weight: torch.Tensor) -> bool:
    """Whether a weight has a storage of its own and counts its versions."""
    return (
        type(weight) in (nn.Parameter, torch.Tensor)
        and weight.layout is torch.strided
        and not weight.is_inference()
    )
