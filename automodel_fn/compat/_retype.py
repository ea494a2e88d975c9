"""Give tensors of a model other dtypes, also such as a cast plan leaves alone, all or nothing.

The original casts every floating-point tensor, float64 and float8 too. Plain tensors are exchanged
together, wholly or not at all, and keep their identity; tensors of a subclass (sharded ones) go
through `Module._apply`, the one public way that keeps FSDP2's own records right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import attrs
import torch
from torch import nn

from automodel_fn.cast._exchange import Exchange, converted, exchange
from automodel_fn.cast._rules import is_plain, storage_groups
from automodel_fn.cast._tensors import NamedTensor, scan
from automodel_fn.dtypes import dtype_name

Rule = Callable[[NamedTensor], torch.dtype | None]
"""For a tensor the dtype that it shall have; None leaves it alone."""


@attrs.frozen
class _Change:
    """One tensor, its dtype to be, and the gradient that goes with it."""

    item: NamedTensor
    dtype: torch.dtype = attrs.field(kw_only=True)

    @property
    def tensor(self) -> torch.Tensor:
        return self.item.tensor


def retype(model: nn.Module, rule: Rule) -> None:
    """Give each floating-point tensor the dtype that `rule` says, and its gradient with it.

    Complex, integer and boolean tensors are left alone, whatever the rule says. Plain tensors
    that are views of one storage follow the first of them that the rule leaves alone, if any.

    Raises:
        Exception: What a conversion raised, before anything was changed.
    """
    items = scan(model).tensors
    changes = [
        _Change(item, dtype=dtype)
        for item in items
        if item.tensor.is_floating_point()
        and (dtype := rule(item)) is not None
        and dtype != item.tensor.dtype
    ]
    changes = _without_torn(items, changes)
    _dry_run(changes)
    plain = [change for change in changes if is_plain(change.tensor)]
    exchange(list(_exchanges(plain)))
    _apply_to_subclasses(model, [change for change in changes if not is_plain(change.tensor)])


def replace_data(model: nn.Module, data: Mapping[str, torch.Tensor]) -> None:
    """Give named tensors float32 data, wholly or not at all; unknown names are ignored.

    Args:
        model: The model.
        data: By FQN, with wrappers or without, the values; plain tensors keep their identity.
    """
    holders = {name: item for item in scan(model).tensors for name in _spellings(item)}
    wanted = {
        id(holders[name].tensor): (holders[name], new)
        for name, new in data.items()
        if name in holders
    }
    plain = [
        Exchange(
            item.names[0],
            tensors=(item.tensor,),
            make=partial(_copied, new),
            num_bytes=new.nbytes,
            can_finish=False,
        )
        for item, new in wanted.values()
        if is_plain(item.tensor)
    ]
    exchange(plain, keep_originals=True)
    special = {key: new for key, (item, new) in wanted.items() if not is_plain(item.tensor)}
    if special:
        model._apply(lambda tensor: special.get(id(tensor), tensor))


def _copied(new: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return (new.detach().to(torch.float32, copy=True),)


def _spellings(item: NamedTensor) -> Iterator[str]:
    yield from (*item.raw_names, *item.names)


def _without_torn(items: Sequence[NamedTensor], changes: list[_Change]) -> list[_Change]:
    """The changes without those that would give views of one storage several dtypes."""
    wanted = {id(change.tensor): change.dtype for change in changes}
    torn: set[int] = set()
    for group in storage_groups(items):
        members = [items[index].tensor for index in group]
        if len({wanted.get(id(tensor)) for tensor in members}) > 1:
            torn.update(id(tensor) for tensor in members)
    return [change for change in changes if id(change.tensor) not in torn]


def _dry_run(changes: Sequence[_Change]) -> None:
    kinds = {(type(c.tensor), c.tensor.dtype, c.dtype, c.tensor.device): c for c in changes}
    for change in kinds.values():
        if not is_plain(change.tensor):
            continue
        try:
            change.tensor.detach().new_empty(1).to(change.dtype)
        except Exception as error:
            error.add_note(
                f"while trying one element, {dtype_name(change.tensor.dtype)} to "
                f"{dtype_name(change.dtype)}; the model was not changed."
            )
            raise


def _exchanges(changes: Sequence[_Change]) -> Iterator[Exchange]:
    items = [change.item for change in changes]
    groups = {index: group for group in storage_groups(items) for index in group}
    for index, change in enumerate(changes):
        group = groups.get(index, [index])
        if index == group[0]:
            tensors = tuple(items[member].tensor for member in group)
            yield _exchange(change.item.names[0], tensors, change.dtype)
        grad = change.tensor.grad
        if grad is not None and is_plain(grad) and grad.dtype != change.dtype:
            yield _exchange(f"{change.item.names[0]}.grad", (grad,), change.dtype)


def _exchange(name: str, tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> Exchange:
    return Exchange(
        name,
        tensors=tensors,
        make=partial(converted, tensors, dtype),
        num_bytes=sum(tensor.numel() for tensor in tensors) * dtype.itemsize,
        can_finish=dtype.itemsize <= tensors[0].dtype.itemsize,
    )


def _apply_to_subclasses(model: nn.Module, changes: Sequence[_Change]) -> None:
    if not changes:
        return
    wanted = {id(change.tensor): change.dtype for change in changes}
    for change in changes:
        if change.tensor.grad is not None:
            wanted[id(change.tensor.grad)] = change.dtype

    def convert(tensor: torch.Tensor) -> torch.Tensor:
        dtype = wanted.get(id(tensor))
        return tensor if dtype is None else tensor.to(dtype)

    model._apply(convert)
