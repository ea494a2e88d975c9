"""The quantized weights that a module keeps: the weights they were made from, and counts."""

from __future__ import annotations

from typing import Any

import attrs
from torch import nn
from torch.nn.parameter import is_lazy

from automodel_fn.step._watch import WeightsWatch

WORKSPACES = "_fp8_workspaces"
"""Transformer Engine's name for the quantized weights that a module keeps."""
UNKNOWN = object()
"""In the place of a recipe: nothing is known of what is kept."""


@attrs.frozen
class CacheCounts:
    """How often modules were told what of their quantized weights.

    Args:
        filled: In a first microbatch: make them anew.
        reused: In a later one: use those that are kept.
        refreshed: In a later one, after a weight or the recipe had changed: those that were kept
            are dropped, and made anew.
        repeated: In a first one that had run the module already: use those that are kept.

    Example:
        >>> CacheCounts(filled=1, reused=3)
        CacheCounts(filled=1, reused=3, refreshed=0, repeated=0)
    """

    filled: int = attrs.field(default=0, kw_only=True)
    reused: int = attrs.field(default=0, kw_only=True)
    refreshed: int = attrs.field(default=0, kw_only=True)
    repeated: int = attrs.field(default=0, kw_only=True)


class Kept:
    """Of one module: its weights as they were when it quantized them, and the counts."""

    __slots__ = (
        "edges",
        "filled",
        "fuses",
        "holders",
        "microbatch",
        "recipe",
        "refreshed",
        "repeated",
        "reused",
        "watch",
    )

    def __init__(self, module: nn.Module, counts: CacheCounts) -> None:
        self._look_at(module)
        self.recipe: object = UNKNOWN
        self.microbatch: int | None = None
        self.filled, self.reused = counts.filled, counts.reused
        self.refreshed, self.repeated = counts.refreshed, counts.repeated

    def _look_at(self, module: nn.Module) -> None:
        modules = list(module.modules())
        self.edges = [
            (within._modules, name, child)
            for within in modules
            for name, child in within._modules.items()
        ]
        self.holders = [part for part in modules if WORKSPACES in vars(part)]
        self.fuses = any(getattr(part, "fuse_wgrad_accumulation", False) for part in self.holders)
        self.watch = WeightsWatch(
            (within._parameters, name)
            for within in modules
            for name, parameter in within._parameters.items()
            if parameter is not None and not is_lazy(parameter) and parameter.dim() > 1
        )

    def __reduce__(self) -> Any:
        # A copy of a module has weights and kept weights of its own, of which nothing is known.
        return _nothing_known, ()

    def has_these(self) -> bool:
        """Whether the module still consists of the modules that it consisted of."""
        return all(within.get(name) is child for within, name, child in self.edges)

    def take(self, module: nn.Module, recipe: object) -> None:
        """The weights as they are now are those that are kept, as soon as the forward has run."""
        if not all(name in weights for weights, name in self.watch.places):
            self._look_at(module)
        self.watch.take()
        self.recipe = recipe

    def is_by(self, recipe: object) -> bool:
        """Whether what is kept was made by this recipe, or by an equal one."""
        if self.recipe is not recipe:
            if type(self.recipe) is not type(recipe) or self.recipe != recipe:
                return False
            self.recipe = recipe
        return True

    def drop(self) -> None:
        """Let the module make its quantized weights anew, in the forward that follows."""
        for part in self.holders:
            vars(part)[WORKSPACES].clear()

    def counts(self) -> CacheCounts:
        return CacheCounts(
            filled=self.filled,
            reused=self.reused,
            refreshed=self.refreshed,
            repeated=self.repeated,
        )


def _nothing_known() -> None:
    return None
