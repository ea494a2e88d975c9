"""What an apply of a backend plan did, as data."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from automodel_fn.convert._entries import SWAP, ModuleSwap
from automodel_fn.plans import Row


@attrs.frozen
class SwapReport:
    """What an apply of a backend plan did.

    Args:
        entries: The plan's entries, carried out.
        notes: The plan's notes.

    Example:
        >>> from torch import nn
        >>> from automodel_fn import BackendConfig, apply, backend_plan
        >>> model = nn.Sequential(nn.RMSNorm(16, eps=1e-6))
        >>> report = apply(backend_plan(model, BackendConfig(rms_norm="torch_fp32")))
        >>> report.num_swaps
        1
    """

    entries: tuple[ModuleSwap, ...]
    notes: tuple[str, ...] = attrs.field(default=(), kw_only=True)
    undo_swap: Callable[[], None] = attrs.field(kw_only=True, eq=False, repr=False)

    @property
    def num_swaps(self) -> int:
        """How many entries changed something."""
        return sum(entry.action == SWAP for entry in self.entries)

    def undo(self) -> None:
        """Bring back what was there before, all or nothing.

        Raises:
            StalePlanError: The modules have changed since; nothing was changed.
        """
        self.undo_swap()

    def rows(self) -> tuple[Row, ...]:
        """One row an entry, as the plan's."""
        return tuple(entry.row() for entry in self.entries)
