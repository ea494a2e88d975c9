"""Carry a cast plan out."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from operator import attrgetter

import torch
from torch import nn

from automodel_fn.cast._batches import Batch, batches_of, conversions_of
from automodel_fn.cast._bits import checksum as checksum_of
from automodel_fn.cast._compare import findings
from automodel_fn.cast._conversions import Conversion, dry_run
from automodel_fn.cast._dtensors import is_distributed, is_whole
from automodel_fn.cast._exchange import Exchange, Originals, exchange
from automodel_fn.cast._groups import refuse_unfit_wrappers
from automodel_fn.cast._interrupts import interrupts_deferred
from automodel_fn.cast._plan import CastPlan
from automodel_fn.cast._range import RangeCount, range_note
from automodel_fn.cast._report import CastReport
from automodel_fn.cast._rules import storage_groups
from automodel_fn.cast._sharded import together
from automodel_fn.cast._tensors import ModelScan, scan
from automodel_fn.cast._undo import Undo
from automodel_fn.errors import StalePlanError, itemized
from automodel_fn.plans import WeakObjects, apply

_logger = logging.getLogger("automodel_fn")


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
    tensors = plan.layout.tensors_of(target, plan.entries)
    # A model that its plan knows again has no shards, and nothing more to be compared.
    model_scan = scan(target) if tensors is None else ModelScan((), modules=())
    conversions: tuple[Conversion, ...] = ()
    originals: Originals | None = None
    is_sharded = False
    try:
        with interrupts_deferred() as check_interrupt, together(model_scan) as shards:
            is_sharded = shards.are_any
            batches = plan.layout.batches
            if tensors is None:
                tensors = tuple(item.tensor for item in model_scan.tensors)
                batches = _fitting(plan, model_scan)
            conversions = conversions_of(batches, tensors, plan.optimizer_refs.alive())
            dry_run(conversions)
            count = RangeCount(conversions)
            check_interrupt()
            originals = exchange(count.exchanges(), shards, keep_originals=keep_originals)
        losses = count.losses()
        notes = (*plan.notes, *range_note(losses))
        if notes:
            _logger.warning(itemized("the cast plan has notes:", notes))
        undo = Undo(conversions, originals, WeakObjects(target)).run if keep_originals else None
        return CastReport(
            plan.entries,
            notes=(*notes, *_view_note(conversions), *_part_note(conversions)),
            range_losses=losses,
            checksums=_checksums(scan(target)) if checksum else (),
            undo_cast=undo,
        )
    except BaseException:
        # A sharded model stays cast: the other ranks have heard that it is.
        if keep_originals and originals is not None and not is_sharded:
            _roll_back(conversions, originals)
        raise


def _fitting(plan: CastPlan, model_scan: ModelScan) -> tuple[Batch, ...]:
    """How the plan's casts are made in a model that it has to be compared with first."""
    groups = storage_groups(model_scan.tensors)
    refuse_stale(plan, model_scan, groups)
    refuse_unfit_wrappers(model_scan, plan.entries)
    return batches_of(plan.entries, model_scan.tensors, groups)


def _roll_back(conversions: Sequence[Conversion], originals: Originals) -> None:
    """Put kept originals back: without the report nobody could."""
    reverse = [
        Exchange.at_once(c.names, c.tensors, partial(tuple, data))
        for c, data in zip(conversions, originals, strict=True)
    ]
    with interrupts_deferred():
        exchange(reverse, must_finish=True)


def refuse_stale(plan: CastPlan, model_scan: ModelScan, groups: Sequence[Sequence[int]]) -> None:
    """Raise if the model is no longer as the plan found it.

    Args:
        plan: The plan.
        model_scan: The model as it is now.
        groups: The indices of its tensors that are views of one storage.

    Raises:
        StalePlanError: With every difference.
    """
    found = findings(plan.entries, model_scan, groups, attrgetter("from_dtype"))
    if found:
        raise StalePlanError(
            itemized(
                f"the cast plan no longer fits the model: {len(found)} differences "
                f"over {len(plan.entries)} entries",
                map(str, found),
                "Nothing was changed. Plan again with cast_plan.",
            )
        )


def _checksums(model_scan: ModelScan) -> tuple[tuple[str, int], ...]:
    return tuple(
        (item.names[0], checksum_of(item.tensor))
        for item in model_scan.tensors
        if is_whole(item.tensor)
    )


def _part_note(conversions: Sequence[Conversion]) -> tuple[str, ...]:
    parts = [
        name
        for conversion in conversions
        if is_distributed(conversion.tensors[0])
        for name, tensor in zip(conversion.names, conversion.tensors, strict=True)
        if not is_whole(tensor)
    ]
    if not parts:
        return ()
    return (
        f"{len(parts)} gradients are sums over ranks that are still to be made, as {parts[0]!r}: "
        "their parts were cast, which is not quite to cast the sum",
    )


def _view_note(conversions: Sequence[Conversion]) -> tuple[str, ...]:
    views = [
        name
        for conversion in conversions
        if any(map(torch.Tensor._is_view, conversion.tensors))
        for name, tensor in zip(conversion.names, conversion.tensors, strict=True)
        if tensor._is_view()
    ]
    if not views:
        return ()
    return (
        f"{len(views)} tensors are views made by an operation, as {views[0]!r}: PyTorch keeps the "
        "memory of what they were a view of for as long as they live",
    )
