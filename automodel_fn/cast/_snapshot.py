"""Copies of a model's tensors, to bring every bit back later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

import attrs
import torch
from torch import nn

from automodel_fn.cast._compare import Finding
from automodel_fn.cast._convert import converted, converted_views, write
from automodel_fn.cast._dtensors import is_sharded, is_whole, local, rewrapped
from automodel_fn.cast._exchange import Exchange, exchange
from automodel_fn.cast._rules import storage_groups
from automodel_fn.cast._selection import selected
from automodel_fn.cast._sharded import together
from automodel_fn.cast._tensors import NamedTensor, scan
from automodel_fn.errors import ConfigError, StalePlanError, itemized
from automodel_fn.plans import WeakObjects


@attrs.frozen
class SavedTensor:
    """The copy of one tensor.

    Args:
        names: The tensor's names.
        data: The copy, of the same dtype, device and strides.

    Example:
        >>> snapshot(nn.Linear(2, 2)).tensors[0].data.shape
        torch.Size([2, 2])
    """

    names: tuple[str, ...]
    data: torch.Tensor = attrs.field(kw_only=True, eq=False, repr=False)


@attrs.frozen
class Snapshot:
    """Copies of some of a model's tensors; it can be restored any number of times.

    Args:
        tensors: The copies.
        model_ref: The model, referred to weakly.

    Example:
        >>> saved = snapshot(nn.Linear(2, 2))
        >>> saved.names, saved.num_bytes
        (('weight', 'bias'), 24)
    """

    tensors: tuple[SavedTensor, ...]
    model_ref: WeakObjects = attrs.field(factory=WeakObjects, kw_only=True, eq=False, repr=False)

    @property
    def names(self) -> tuple[str, ...]:
        """The canonical FQNs of what was copied."""
        return tuple(saved.names[0] for saved in self.tensors)

    def model(self) -> nn.Module:
        """The model that was copied.

        Raises:
            ConfigError: It is gone.
        """
        alive = self.model_ref.alive()
        if not alive:
            raise ConfigError("model=None: the snapshot's model is gone; say which one.")
        return alive[0]

    @property
    def num_bytes(self) -> int:
        """How much memory the copies take, on this rank."""
        return sum(local(saved.data).nbytes for saved in self.tensors)


def snapshot(model: nn.Module, names: str | Iterable[str] | None = None) -> Snapshot:
    """Copy tensors of a model. Does not touch the model.

    A cast needs none for its fp32 pins: it does not touch them. This is for what is to be changed
    and brought back. Replaces `_snapshot_fp32_tensors` (NeMo Automodel).

    Args:
        model: The model.
        names: Which tensors, in the grammar of `cast_plan(keep_fp32=)`; None copies all.

    Raises:
        ConfigError: A name that matches nothing, or a tensor of a subclass, which has no copy.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = snapshot(model, "weight")
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_()
        >>> restore(before)
        >>> bool(model.weight.any())
        True
    """
    model_scan = scan(model)
    items = model_scan.tensors
    if names is not None:
        chosen = selected(model_scan, names, "names")
        items = tuple(item for index, item in enumerate(items) if index in chosen)
    special = [item.names[0] for item in items if not is_whole(item.tensor)]
    if special:
        raise ConfigError(
            itemized(
                f"{len(special)} tensors are of a subclass with a representation of its own:",
                special,
                "Leave them out with names=.",
            )
        )
    copies = tuple(SavedTensor(item.names, data=_copy(item.tensor)) for item in items)
    return Snapshot(copies, model_ref=WeakObjects(model))


def restore(saved: Snapshot, model: nn.Module | None = None) -> None:
    """Give a model's tensors the dtypes and bits of a snapshot, wholly or not at all.

    The tensors stay the same objects, with their ties. Gradients are left as they are, but where a
    sharded tensor gets another dtype its gradient gets it too.
    Replaces `_restore_fp32_tensor_snapshots` (NeMo Automodel).

    Args:
        saved: The snapshot; it can be restored again.
        model: The model; by default the one that the snapshot was made of.

    Raises:
        StalePlanError: The model's tensors have other names, ties or shapes than those copied, or
            are on another device; nothing was changed.
        ConfigError: There is no model.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = snapshot(model)
        >>> other = nn.Linear(2, 2)
        >>> restore(before, other)
        >>> torch.equal(model.weight, other.weight)
        True
    """
    target = saved.model() if model is None else model
    model_scan = scan(target)
    with together(model_scan) as shards:
        exchange(_checked(saved, model_scan.tensors), shards, keep_originals=True)


def _checked(saved: Snapshot, items: Sequence[NamedTensor]) -> list[Exchange]:
    held = {item.names: item for item in items}
    found = [finding for one in saved.tensors for finding in _misfits(one, held)]
    if found:
        raise StalePlanError(
            itemized(
                f"the snapshot no longer fits the model: {len(found)} differences",
                map(str, found),
                "Nothing was changed.",
            )
        )
    copies = {one.names: one.data for one in saved.tensors}
    return list(_exchanges(items, copies))


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def _misfits(saved: SavedTensor, held: Mapping[tuple[str, ...], NamedTensor]) -> Iterator[Finding]:
    item = held.get(saved.names)
    if item is None:
        yield Finding(
            saved.names[0], what="names", expected=", ".join(saved.names), found="other names"
        )
        return
    for what in ("shape", "device", "placements"):
        expected, found = (getattr(t, what, None) for t in (saved.data, item.tensor))
        if expected != found:
            yield Finding(saved.names[0], what=what, expected=str(expected), found=str(found))


def _exchanges(
    items: Sequence[NamedTensor], copies: Mapping[tuple[str, ...], torch.Tensor]
) -> Iterator[Exchange]:
    """One exchange a storage; tensors that share it with a copied one get the new storage too."""
    groups = {index: group for group in storage_groups(items) for index in group}
    for index in range(len(items)):
        group = groups.get(index, [index])
        members = [items[member] for member in group]
        if index != group[0] or not any(member.names in copies for member in members):
            continue
        yield Exchange.at_once(
            tuple(member.names[0] for member in members),
            tuple(member.tensor for member in members),
            partial(_restored, members, copies),
        )
        yield from _gradients(members, copies)


def _gradients(
    members: Sequence[NamedTensor], copies: Mapping[tuple[str, ...], torch.Tensor]
) -> Iterator[Exchange]:
    """The gradients of sharded tensors that get another dtype: PyTorch wants them to agree."""
    for member in members:
        copy, grad = copies.get(member.names), member.tensor.grad
        if copy is None or grad is None or not is_sharded(grad):
            continue
        if grad.dtype == member.tensor.dtype != copy.dtype:
            name, make = f"{member.names[0]}.grad", partial(converted, (grad,), copy.dtype)
            yield Exchange.at_once((name,), (grad,), make)


def _restored(
    members: Sequence[NamedTensor], copies: Mapping[tuple[str, ...], torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    if len(members) == 1:
        return (_copy(copies[members[0].names]),)
    tensors = tuple(member.tensor for member in members)
    if any(map(is_sharded, tensors)):
        shards = [attrs.evolve(member, tensor=local(member.tensor)) for member in members]
        made = _restored(shards, {names: local(copy) for names, copy in copies.items()})
        return tuple(map(rewrapped, tensors, made))
    dtypes = {copies[m.names].dtype for m in members if m.names in copies}
    if dtypes <= {tensor.dtype for tensor in tensors}:
        fresh = _on_new_storage(tensors)
    else:
        fresh = converted_views(tensors, dtypes.pop())
    for member, view in zip(members, fresh, strict=True):
        if member.names in copies:
            write(view, copies[member.names])
    return fresh


def _on_new_storage(tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    storage = tensors[0].untyped_storage().clone()
    return tuple(
        torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
            storage, tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        for tensor in tensors
    )
