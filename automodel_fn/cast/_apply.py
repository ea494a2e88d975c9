"""Carry a cast plan out."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Sequence

import attrs
import torch
from torch import nn
from torch.optim import Optimizer

from automodel_fn.cast._bits import checksum as checksum_of
from automodel_fn.cast._bits import merged, same_bits
from automodel_fn.cast._compare import findings
from automodel_fn.cast._exchange import Exchange, Originals, converted, exchange
from automodel_fn.cast._plan import CastPlan, CastReport, TensorCast, WeakObjects
from automodel_fn.cast._rules import is_plain, storage_groups
from automodel_fn.cast._tensors import ModelScan, scan
from automodel_fn.dtypes import dtype_name, is_wider
from automodel_fn.errors import StalePlanError, itemized
from automodel_fn.plans import apply

_logger = logging.getLogger("automodel_fn")


@attrs.frozen
class Conversion:
    """A dtype change of one storage: weights, a gradient, or optimizer state.

    Args:
        name: What it is, for messages.
        owner: Canonical FQN of the weight that it is of or belongs to.
        tensors: The tensor, or all tensors that are views of the storage.
        from_dtype: Their dtype before.
        to_dtype: Their dtype afterwards.
        is_weight: Whether it is a parameter or buffer, not something that belongs to one.
    """

    name: str
    owner: str = attrs.field(kw_only=True)
    tensors: tuple[torch.Tensor, ...] = attrs.field(kw_only=True, eq=False, repr=False)
    from_dtype: torch.dtype = attrs.field(kw_only=True)
    to_dtype: torch.dtype = attrs.field(kw_only=True)
    is_weight: bool = attrs.field(kw_only=True)

    def exchange(self) -> Exchange:
        """The exchange that carries it out."""
        numel = sum(tensor.numel() for tensor in self.tensors)
        return Exchange(
            self.name,
            tensors=self.tensors,
            make=lambda: converted(self.tensors, self.to_dtype),
            num_bytes=numel * self.to_dtype.itemsize,
            can_finish=not is_wider(self.to_dtype, self.from_dtype),
        )


@apply.register
def apply_cast_plan(
    plan: CastPlan,
    model: nn.Module | None = None,
    *,
    keep_originals: bool = False,
    checksum: bool = False,
) -> CastReport:
    """Carry a cast plan out, wholly or not at all; see `apply`."""
    target = plan.model() if model is None else model
    model_scan = scan(target)
    refuse_stale(plan, model_scan)
    conversions = tuple(conversions_of(plan.entries, model_scan, plan.optimizer_refs.alive()))
    dry_run(conversions)
    originals = exchange([c.exchange() for c in conversions], keep_originals=keep_originals)
    if plan.notes:
        _logger.warning(itemized("the cast plan has notes:", plan.notes))
    return CastReport(
        plan.entries,
        bytes_before=sum(entry.numel * entry.from_dtype.itemsize for entry in plan.entries),
        bytes_after=sum(entry.numel * entry.to_dtype.itemsize for entry in plan.entries),
        notes=(*plan.notes, *_view_note(conversions)),
        checksums=_checksums(model_scan) if checksum else (),
        undo_cast=_Undo(conversions, originals, WeakObjects(target)).run
        if keep_originals
        else None,
    )


def refuse_stale(plan: CastPlan, model_scan: ModelScan) -> None:
    """Raise if the model is no longer as the plan found it.

    Raises:
        StalePlanError: With every difference.
    """
    found = findings(plan.entries, model_scan, lambda entry: entry.from_dtype)
    if found:
        raise StalePlanError(
            itemized(
                f"the cast plan no longer fits the model: {len(found)} differences "
                f"over {len(plan.entries)} entries",
                map(str, found),
                "Nothing was changed. Plan again with cast_plan.",
            )
        )


def conversions_of(
    entries: Sequence[TensorCast], model_scan: ModelScan, optimizers: Sequence[Optimizer] = ()
) -> Iterator[Conversion]:
    """Every dtype change that the entries ask for: weights, then what belongs to each of them."""
    planned = {name: entry for entry in entries if entry.changes for name in entry.names}
    changing = [item for item in model_scan.tensors if item.names[0] in planned]
    grouped = {index: group for group in storage_groups(changing) for index in group}
    for index, item in enumerate(changing):
        entry = planned[item.names[0]]
        group = grouped.get(index, [index])
        if index == group[0]:
            tensors = tuple(changing[member].tensor for member in group)
            yield _conversion(entry.name, tensors, entry, is_weight=True)
        for name, tensor in _belongings(item.tensor, entry, optimizers):
            yield _conversion(name, (tensor,), entry, is_weight=False)


def _conversion(
    name: str, tensors: tuple[torch.Tensor, ...], entry: TensorCast, *, is_weight: bool
) -> Conversion:
    return Conversion(
        name,
        owner=entry.name,
        tensors=tensors,
        from_dtype=entry.from_dtype,
        to_dtype=entry.to_dtype,
        is_weight=is_weight,
    )


def _belongings(
    tensor: torch.Tensor, entry: TensorCast, optimizers: Sequence[Optimizer]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor's gradient, and its optimizer state of its own shape and dtype; no step counters."""
    if tensor.grad is not None and tensor.grad.dtype == entry.from_dtype:
        yield f"{entry.name}.grad", tensor.grad
    for optimizer in optimizers:
        for key, value in optimizer.state.get(tensor, {}).items():
            is_alike = isinstance(value, torch.Tensor) and value.shape == tensor.shape
            if is_alike and key != "step" and value.dtype == entry.from_dtype:
                yield f"{entry.name} ({key})", value


def dry_run(conversions: Sequence[Conversion]) -> None:
    """Cast one element of each kind, so that what cannot be cast fails before anything changes."""
    kinds = {
        (type(t), c.from_dtype, c.to_dtype, t.device): t for c in conversions for t in c.tensors
    }
    for (kind, from_dtype, to_dtype, _), tensor in kinds.items():
        try:
            tensor.detach().new_empty(1).to(to_dtype)
        except Exception as error:
            error.add_note(
                f"while trying one element of {kind.__name__}, {dtype_name(from_dtype)} to "
                f"{dtype_name(to_dtype)}; the model was not changed."
            )
            raise


def _checksums(model_scan: ModelScan) -> tuple[tuple[str, int], ...]:
    return tuple(
        (item.names[0], checksum_of(item.tensor))
        for item in model_scan.tensors
        if is_plain(item.tensor)
    )


@attrs.define
class _Undo:
    """The way back from one apply; works once."""

    conversions: Sequence[Conversion]
    originals: Originals | None
    model_ref: WeakObjects

    def run(self) -> None:
        if self.originals is None:
            raise StalePlanError("this cast was undone already; there is nothing left to undo.")
        pairs = tuple(zip(self.conversions, self.originals, strict=True))
        present = {id(i.tensor) for model in self.model_ref.alive() for i in scan(model).tensors}
        changed = [
            conversion.name
            for conversion, originals in pairs
            if conversion.is_weight and not _is_unchanged(conversion, originals, present)
        ]
        if changed:
            raise StalePlanError(
                itemized(
                    f"the weights changed since the cast: {len(changed)} tensors differ from what "
                    "it left",
                    changed,
                    "Nothing was changed. Bring the dtypes back with apply(plan.inverse()).",
                )
            )
        reverse = [_reverse(*pair) for pair in pairs]
        exchange([*reverse, *_new_gradients(self.conversions)], keep_originals=True)
        self.originals = None


def _is_unchanged(
    conversion: Conversion, originals: tuple[torch.Tensor, ...], present: Container[int]
) -> bool:
    """Whether the model still holds these tensors, with the bits that the cast gave them."""
    again = converted(originals, conversion.to_dtype)
    return all(
        id(tensor) in present and same_bits(tensor, cast)
        for tensor, cast in zip(conversion.tensors, again, strict=True)
    )


def _new_gradients(conversions: Sequence[Conversion]) -> Iterator[Exchange]:
    """Gradients that came after the cast: they go back with their weights."""
    known = {id(tensor) for conversion in conversions for tensor in conversion.tensors}
    for conversion in conversions:
        for tensor in conversion.tensors if conversion.is_weight else ():
            grad = tensor.grad
            if grad is None or id(grad) in known or grad.dtype != conversion.to_dtype:
                continue
            yield Conversion(
                f"{conversion.name}.grad",
                owner=conversion.owner,
                tensors=(grad,),
                from_dtype=conversion.to_dtype,
                to_dtype=conversion.from_dtype,
                is_weight=False,
            ).exchange()


def _view_note(conversions: Sequence[Conversion]) -> tuple[str, ...]:
    views = [c.name for c in conversions if any(tensor._is_view() for tensor in c.tensors)]
    if not views:
        return ()
    return (
        f"{len(views)} tensors are views made by an operation, as {views[0]!r}: PyTorch keeps the "
        "memory of what they were a view of for as long as they live",
    )


def _reverse(conversion: Conversion, originals: tuple[torch.Tensor, ...]) -> Exchange:
    def make() -> tuple[torch.Tensor, ...]:
        if conversion.is_weight:
            return originals
        (tensor,), (original,) = conversion.tensors, originals
        return (merged(original, tensor, conversion.from_dtype),)

    return Exchange(
        conversion.name,
        tensors=conversion.tensors,
        make=make,
        num_bytes=0,
        can_finish=False,
    )
