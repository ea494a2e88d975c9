"""What an apply did, as data."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from automodel_fn.cast._entries import TensorCast
from automodel_fn.cast._range import RangeLoss
from automodel_fn.errors import ConfigError
from automodel_fn.plans import Row


@attrs.frozen
class CastReport:
    """What an apply did.

    Args:
        entries: The plan's entries, carried out.
        notes: The plan's notes, and what was found while casting.
        range_losses: What casts to float16 made infinite or zero, tensor by tensor; of gradients
            and optimizer state too. Empty if nothing was lost so, and on meta.
        checksums: (name, checksum of the bits) of every tensor, if asked for.

    Example:
        >>> import torch
        >>> from automodel_fn import apply, bf16, cast_plan
        >>> model = torch.nn.Linear(2, 2)
        >>> report = apply(cast_plan(model, bf16), keep_originals=True)
        >>> report.undo()
        >>> model.weight.dtype
        torch.float32
    """

    entries: tuple[TensorCast, ...]
    notes: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    range_losses: tuple[RangeLoss, ...] = attrs.field(default=(), kw_only=True)
    checksums: tuple[tuple[str, int], ...] = attrs.field(default=(), kw_only=True)
    undo_cast: Callable[[], None] | None = attrs.field(
        default=None, kw_only=True, eq=False, repr=False
    )

    @property
    def bytes_before(self) -> int:
        """Size of all parameters and buffers before, each tensor once."""
        return sum(entry.bytes_before for entry in self.entries)

    @property
    def bytes_after(self) -> int:
        """The same afterwards."""
        return sum(entry.bytes_after for entry in self.entries)

    def undo(self) -> None:
        """Bring back every bit from before, all or nothing; works once.

        Raises:
            ConfigError: The originals were not kept.
            StalePlanError: The weights have changed since; nothing was changed.
        """
        if self.undo_cast is None:
            raise ConfigError(
                "keep_originals=False: this cast kept nothing to undo; "
                "cast with apply(plan, keep_originals=True), or bring the dtypes back with "
                "apply(plan.inverse())."
            )
        self.undo_cast()

    def rows(self) -> tuple[Row, ...]:
        """One row a tensor, as the plan's."""
        return tuple(entry.row() for entry in self.entries)
