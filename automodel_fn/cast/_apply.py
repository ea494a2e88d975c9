"""Carry a cast plan out."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from torch import nn

from automodel_fn.cast._bits import checksum as checksum_of
from automodel_fn.cast._compare import findings
from automodel_fn.cast._conversions import Conversion, conversions_of, dry_run
from automodel_fn.cast._dtensors import is_whole
from automodel_fn.cast._exchange import exchange
from automodel_fn.cast._groups import refuse_mixed_groups
from automodel_fn.cast._plan import CastPlan, WeakObjects
from automodel_fn.cast._report import CastReport
from automodel_fn.cast._sharded import together
from automodel_fn.cast._tensors import ModelScan, scan
from automodel_fn.cast._undo import Undo
from automodel_fn.errors import StalePlanError, itemized
from automodel_fn.plans import apply

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
    model_scan = scan(target)
    with together(model_scan) as shards:
        refuse_stale(plan, model_scan)
        refuse_mixed_groups(model_scan, plan.entries)
        conversions = tuple(conversions_of(plan.entries, model_scan, plan.optimizer_refs.alive()))
        dry_run(conversions)
        exchanges = [c.exchange() for c in conversions]
        originals = exchange(exchanges, shards, keep_originals=keep_originals)
    if plan.notes:
        _logger.warning(itemized("the cast plan has notes:", plan.notes))
    return CastReport(
        plan.entries,
        bytes_before=sum(entry.numel * entry.from_dtype.itemsize for entry in plan.entries),
        bytes_after=sum(entry.numel * entry.to_dtype.itemsize for entry in plan.entries),
        notes=(*plan.notes, *_view_note(conversions), *_part_note(conversions)),
        checksums=_checksums(model_scan) if checksum else (),
        undo_cast=Undo(conversions, originals, WeakObjects(target)).run if keep_originals else None,
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


def _checksums(model_scan: ModelScan) -> tuple[tuple[str, int], ...]:
    return tuple(
        (item.names[0], checksum_of(item.tensor))
        for item in model_scan.tensors
        if is_whole(item.tensor)
    )


def _part_note(conversions: Sequence[Conversion]) -> tuple[str, ...]:
    parts = [c.name for c in conversions if not all(map(is_whole, c.tensors))]
    if not parts:
        return ()
    return (
        f"{len(parts)} gradients are sums over ranks that are still to be made, as {parts[0]!r}: "
        "their parts were cast, which is not quite to cast the sum",
    )


def _view_note(conversions: Sequence[Conversion]) -> tuple[str, ...]:
    views = [c.name for c in conversions if any(tensor._is_view() for tensor in c.tensors)]
    if not views:
        return ()
    return (
        f"{len(views)} tensors are views made by an operation, as {views[0]!r}: PyTorch keeps the "
        "memory of what they were a view of for as long as they live",
    )
