"""By what a plan knows the model again that it was made from, many tensors at a time.

Almost every plan is applied to its own model, unchanged. To find that out, no name has to be
spelled again: the model's modules are the same, hold the same things under the same keys, and
their tensors are still what the plan says. Anything else is for the slow comparison, which can say
what differs.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from automodel_fn.cast._batches import Batch, picked
from automodel_fn.cast._dtensors import is_plain
from automodel_fn.cast._entries import TensorCast
from automodel_fn.cast._groups import holds_parameters
from automodel_fn.cast._tensors import ModelScan

_HELD = {"_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"}
_traits = attrgetter("__class__", "dtype", "requires_grad", "shape", "device")


class Layout:
    """Where a model held its tensors when it was planned. A copy or pickle knows nothing.

    Weak: modules are referred to weakly, and of tensors their `id` is known, which says only
    whether two places held the same one.
    """

    __slots__ = ("_entries", "_kinds", "_places", "_planned", "_references", "_shape", "batches")

    def __init__(
        self,
        model_scan: ModelScan | None = None,
        entries: Sequence[TensorCast] = (),
        batches: tuple[Batch, ...] = (),
    ) -> None:
        self.batches = batches
        self._entries: Sequence[TensorCast] | None = None
        if model_scan is None or not _is_ordinary(model_scan):
            return
        modules = [module for _, _, module in model_scan.modules]
        tensors = [item.tensor for item in model_scan.tensors]
        flat, self._shape = _seen(modules)
        first = dict(zip(map(id, reversed(flat)), range(len(flat) - 1, -1, -1), strict=True))
        self._entries = entries
        self._references = [*map(weakref.ref, modules)]
        self._kinds = [*map(type, modules)]
        self._places = tuple(first[id(tensor)] for tensor in tensors)
        self._planned = [*map(_traits, tensors)]

    def __reduce__(self) -> tuple[type[Layout], tuple[()]]:
        return Layout, ()

    def tensors_of(
        self, model: nn.Module, entries: Sequence[TensorCast]
    ) -> tuple[torch.Tensor, ...] | None:
        """The model's tensors in the order of the entries, if all is as planned; None if not.

        Args:
            model: The model.
            entries: The entries of the plan that is to be applied.
        """
        if entries is not self._entries or self._references[0]() is not model:
            return None
        modules = [reference() for reference in self._references]
        if [*map(type, modules)] != self._kinds:
            return None
        flat, shape = _seen(modules)
        if shape != self._shape:
            return None
        tensors = picked(flat, self._places)
        return tensors if _are_as_planned(tensors, self._planned) else None


def _is_ordinary(model_scan: ModelScan) -> bool:
    """Whether its tensors are plain, each with a storage of its own, and no wrapper holds any."""
    tensors = [item.tensor for item in model_scan.tensors]
    one_of_each_type = {type(module): module for _, _, module in model_scan.modules}
    return (
        all(map(is_plain, tensors))
        and _have_own_storages(tensors)
        and not model_scan.fsdp_groups
        and not any(map(holds_parameters, one_of_each_type.values()))
        and all(vars(module).keys() >= _HELD for module in one_of_each_type.values())
    )


def _have_own_storages(tensors: Sequence[torch.Tensor]) -> bool:
    storages = {tensor.untyped_storage()._cdata for tensor in tensors}
    return len(storages) == len(tensors)


def _are_as_planned(tensors: Sequence[torch.Tensor], planned: Sequence[Any]) -> bool:
    """Whether tensors still have their traits, and storages of their own.

    In one pass: what many tensors cost is to fetch each of them from memory.
    """
    storages: set[int] = set()
    add = storages.add
    for tensor, traits in zip(tensors, planned, strict=True):
        if _traits(tensor) != traits:
            return False
        add(tensor.untyped_storage()._cdata)
    return len(storages) == len(tensors)


def _seen(modules: Iterable[Any]) -> tuple[list[Any], list[Any]]:
    """The parameters and buffers of modules, and what each holds under which key.

    Of the things held it is their `id`; behind the keys of a module stands its number.
    """
    children: list[Any] = []
    parameters: list[Any] = []
    buffers: list[Any] = []
    keys: list[Any] = []
    for number, module in enumerate(modules):
        held = module.__dict__
        if named := held["_modules"]:
            children += named.values()
            keys += named
            keys.append(number)
        if named := held["_parameters"]:
            parameters += named.values()
            keys += named
            keys.append(number)
        if named := held["_buffers"]:
            buffers += named.values()
            keys += named
            keys.append((number, frozenset(held["_non_persistent_buffers_set"])))
    ids = ([*map(id, held)] for held in (children, parameters, buffers))
    return parameters + buffers, [keys, *ids]
