"""What a model is and what a plan says it is: one comparison, for stale plans and for audits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import attrs
import torch

from automodel_fn.cast._entries import TensorCast
from automodel_fn.cast._tensors import ModelScan, NamedTensor
from automodel_fn.dtypes import dtype_name


@attrs.frozen
class Finding:
    """One thing about a tensor that is not as planned.

    Args:
        name: Its canonical FQN.
        what: What differs: "dtype", "shape", "kind", "names", "requires_grad", "presence",
            "storage" or "bits".
        expected: What was planned, in words.
        found: What is there, in words.

    Example:
        >>> str(Finding("norm.weight", what="dtype", expected="float32", found="bfloat16"))
        'norm.weight: dtype should be float32, found bfloat16'
    """

    name: str
    what: str = attrs.field(kw_only=True)
    expected: str = attrs.field(kw_only=True)
    found: str = attrs.field(kw_only=True)

    def __str__(self) -> str:
        """The finding in one line."""
        return f"{self.name}: {self.what} should be {self.expected}, found {self.found}"


def findings(
    entries: Sequence[TensorCast],
    model_scan: ModelScan,
    groups: Sequence[Sequence[int]],
    dtype_of: Callable[[TensorCast], torch.dtype],
) -> tuple[Finding, ...]:
    """Every way in which the model differs from the entries; empty if it does not.

    Args:
        entries: A plan's entries.
        model_scan: The model as it is now.
        groups: The indices of its tensors that are views of one storage.
        dtype_of: Which dtype of an entry the model should have.
    """
    tensors = model_scan.tensors
    torn = _torn_groups(entries, model_scan, groups) if groups else ()
    if len(entries) == len(tensors) and all(
        _is_as_planned(entry, item, dtype_of(entry))
        for entry, item in zip(entries, tensors, strict=True)
    ):
        return tuple(torn)
    holders = {name: item for item in model_scan.tensors for name in item.names}
    found = [f for entry in entries for f in _differences(entry, holders, dtype_of(entry))]
    planned = Counter(name for entry in entries for name in entry.names)
    found += [
        Finding(name, what="names", expected="in one entry", found=f"in {count}")
        for name, count in planned.items()
        if count > 1
    ]
    found += [
        Finding(item.names[0], what="presence", expected="absent", found="a tensor")
        for item in model_scan.tensors
        if planned.keys().isdisjoint(item.names)
    ]
    return (*found, *torn)


def _is_as_planned(entry: TensorCast, item: NamedTensor, dtype: torch.dtype) -> bool:
    tensor = item.tensor
    return (
        entry.names == item.names
        and entry.kind == item.kind
        and entry.shape == tensor.shape
        and dtype is tensor.dtype
        and entry.requires_grad is tensor.requires_grad
    )


def _differences(
    entry: TensorCast, holders: dict[str, NamedTensor], dtype: torch.dtype
) -> Iterator[Finding]:
    item = holders.get(entry.name)
    if item is None:
        yield Finding(entry.name, what="presence", expected="a tensor", found="absent")
        return
    tensor = item.tensor
    if _is_as_planned(entry, item, dtype):
        return
    pairs = {
        "names": (", ".join(sorted(entry.names)), ", ".join(sorted(item.names))),
        "kind": (entry.kind, item.kind),
        "shape": (str(entry.shape), str(tuple(tensor.shape))),
        "dtype": (dtype_name(dtype), dtype_name(tensor.dtype)),
        "requires_grad": (str(entry.requires_grad), str(tensor.requires_grad)),
    }
    for what, (expected, found) in pairs.items():
        if expected != found:
            yield Finding(entry.name, what=what, expected=expected, found=found)


def _torn_groups(
    entries: Sequence[TensorCast], model_scan: ModelScan, groups: Sequence[Sequence[int]]
) -> Iterator[Finding]:
    """Storages that the entries would tear apart: planned on a model that did not share them."""
    planned = {name: entry for entry in entries for name in entry.names}
    for group in groups:
        members = [model_scan.tensors[index].names[0] for index in group]
        known = [planned[name] for name in members if name in planned]
        if len({(entry.from_dtype, entry.to_dtype) for entry in known}) > 1 and any(
            entry.changes for entry in known
        ):
            yield Finding(
                members[0],
                what="storage",
                expected="its own",
                found=f"one shared with {', '.join(members[1:])}, planned otherwise",
            )
