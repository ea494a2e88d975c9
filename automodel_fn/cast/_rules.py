"""From a rule for each tensor to the entries of a plan: one decision a storage."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import IntEnum

import attrs
import torch

from automodel_fn.cast._dtensors import is_plain, is_whole, local
from automodel_fn.cast._entries import CAST, KEEP, SKIP, TensorCast
from automodel_fn.cast._tensors import NamedTensor
from automodel_fn.dtypes import CASTABLE, dtype_name


class Weight(IntEnum):
    """Which decision stands where tensors that share a storage were decided differently."""

    MILD_SKIP = 0
    CAST = 1
    KEEP = 2
    FIRM_SKIP = 3


@attrs.frozen
class Decision:
    """What becomes of a tensor, before its storage is looked at."""

    to_dtype: torch.dtype
    weight: Weight = attrs.field(kw_only=True)
    reason: str = attrs.field(kw_only=True)

    @property
    def action(self) -> str:
        """The action of the entry that comes of it."""
        return {Weight.CAST: CAST, Weight.KEEP: KEEP}.get(self.weight, SKIP)


def skipped(item: NamedTensor, reason: str, *, is_mild: bool = False) -> Decision:
    """Leave a tensor alone; mildly if it may follow another one that shares its storage."""
    weight = Weight.MILD_SKIP if is_mild else Weight.FIRM_SKIP
    return Decision(item.tensor.dtype, weight=weight, reason=reason)


def uncastable(item: NamedTensor) -> Decision | None:
    """The decision for a tensor that no cast may touch, or None for one that it may."""
    if not is_whole(item.tensor):
        kind = type(item.tensor).__name__
        return skipped(item, f"a {kind} is left as it is: only plain tensors and DTensors are cast")
    if item.tensor.dtype not in CASTABLE:
        return skipped(item, f"{dtype_name(item.tensor.dtype)} is left as it is")
    return None


def kept(item: NamedTensor, reason: str) -> Decision:
    """Keep a tensor in float32; a narrower one is cast up, and the reason says what that is worth.

    A float64 tensor is wider already and an integer one has no such precision: they are left.
    """
    found = uncastable(item)
    if found is not None:
        return attrs.evolve(found, reason=f"{reason}; {found.reason}")
    if item.tensor.dtype != torch.float32:
        stored = dtype_name(item.tensor.dtype)
        reason += f"; cast up from {stored}, its low bits were already gone"
    return Decision(torch.float32, weight=Weight.KEEP, reason=reason)


def cast_to(item: NamedTensor, dtype: torch.dtype, reason: str) -> Decision:
    """Cast a castable tensor, unless it is of that dtype already."""
    if item.tensor.dtype == dtype:
        return skipped(item, f"already {dtype_name(dtype)}", is_mild=True)
    return Decision(dtype, weight=Weight.CAST, reason=reason)


def decide(
    tensors: Sequence[NamedTensor],
    groups: Sequence[Sequence[int]],
    rule: Callable[[int, NamedTensor], Decision],
) -> tuple[tuple[TensorCast, ...], tuple[str, ...]]:
    """Entries for all tensors, and a note for each group that shares a storage."""
    decisions = [rule(index, item) for index, item in enumerate(tensors)]
    notes: list[str] = []
    for group in groups:
        names = ", ".join(tensors[index].names[0] for index in group)
        if len({tensors[index].tensor.dtype for index in group}) > 1:
            for index in group:
                reason = "its storage is also read in another dtype"
                decisions[index] = skipped(tensors[index], reason)
            notes.append(f"{names} share one storage in several dtypes and are left alone")
            continue
        leader = max(group, key=lambda index: decisions[index].weight)
        _follow(tensors, decisions, group, leader)
        verb = {CAST: "cast", KEEP: "kept"}.get(decisions[leader].action, "left alone")
        notes.append(f"{names} share one storage and are {verb} together")
    entries = tuple(_entry(item, d) for item, d in zip(tensors, decisions, strict=True))
    return entries, tuple(notes)


def storage_groups(tensors: Sequence[NamedTensor]) -> list[list[int]]:
    """The indices of distinct tensors that are views of one storage; single ones are left out."""
    holders: dict[int, int | list[int]] = {}
    groups: list[list[int]] = []
    for index, item in enumerate(tensors):
        held = item.tensor
        if not is_plain(held):
            if not is_whole(held):
                continue
            held = local(held)
        if not held.numel():
            continue
        storage = held.untyped_storage()._cdata
        first = holders.setdefault(storage, index)
        if first == index:
            continue
        if isinstance(first, int):
            first = holders[storage] = [first]
            groups.append(first)
        first.append(index)
    return groups


def _follow(
    tensors: Sequence[NamedTensor], decisions: list[Decision], group: Sequence[int], leader: int
) -> None:
    first = decisions[leader]
    for index in group:
        if decisions[index].weight != first.weight:
            reason = f"shares its storage with {tensors[leader].names[0]!r}: {first.reason}"
            decisions[index] = attrs.evolve(first, reason=reason)


def _entry(item: NamedTensor, decision: Decision) -> TensorCast:
    return TensorCast(
        item.names,
        kind=item.kind,
        shape=tuple(item.tensor.shape),
        from_dtype=item.tensor.dtype,
        to_dtype=decision.to_dtype,
        action=decision.action,
        reason=decision.reason,
        requires_grad=item.tensor.requires_grad,
    )
