"""Carry a cast plan out."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from operator import attrgetter

from torch import nn

from automodel_fn.cast._bits import checksum as checksum_of
from automodel_fn.cast._compare import findings
from automodel_fn.cast._conversions import Conversion, conversions_of, dry_run
from automodel_fn.cast._exchange import exchange
from automodel_fn.cast._plan import CastPlan, WeakObjects
from automodel_fn.cast._report import CastReport
from automodel_fn.cast._rules import is_plain, storage_groups
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
    groups = storage_groups(model_scan.tensors)
    refuse_stale(plan, model_scan, groups)
    optimizers = plan.optimizer_refs.alive()
    conversions = conversions_of(plan.entries, model_scan, groups, optimizers)
    dry_run(conversions)
    originals = exchange([c.exchange() for c in conversions], keep_originals=keep_originals)
    if plan.notes:
        _logger.warning(itemized("the cast plan has notes:", plan.notes))
    sized = [(math.prod(entry.shape), entry) for entry in plan.entries]
    return CastReport(
        plan.entries,
        bytes_before=sum(numel * e.from_dtype.itemsize for numel, e in sized),
        bytes_after=sum(numel * e.to_dtype.itemsize for numel, e in sized),
        notes=(*plan.notes, *_view_note(conversions)),
        checksums=_checksums(model_scan) if checksum else (),
        undo_cast=Undo(conversions, originals, WeakObjects(target)).run if keep_originals else None,
    )


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
        if is_plain(item.tensor)
    )


def _view_note(conversions: Sequence[Conversion]) -> tuple[str, ...]:
    views = [
        name
        for conversion in conversions
        for name, tensor in zip(conversion.names, conversion.tensors, strict=True)
        if tensor._is_view()
    ]
    if not views:
        return ()
    return (
        f"{len(views)} tensors are views made by an operation, as {views[0]!r}: PyTorch keeps the "
        "memory of what they were a view of for as long as they live",
    )
