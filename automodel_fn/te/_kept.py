"""The quantized weights that a module keeps: the weights they were made from, and counts."""

from __future__ import annotations

from typing import Any

import attrs
from torch import nn
from torch.nn.parameter import is_lazy

from automodel_fn.step._freshness import WeightWatch

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
        "watched",
    )

    def __init__(self, module: nn.Module, counts: CacheCounts) -> None:
        modules = list(module.modules())
        self.edges = [
            (within._modules, name, child)
            for within in modules
            for name, child in within._modules.items()
        ]
        self.holders = [part for part in modules if WORKSPACES in vars(part)]
        self.fuses = any(getattr(part, "fuse_wgrad_accumulation", False) for part in self.holders)
        self.watched: list[tuple[dict[str, Any], str, WeightWatch | None]] = [
            (within._parameters, name, None)
            for within in modules
            for name, parameter in within._parameters.items()
            if parameter is not None and not is_lazy(parameter) and parameter.dim() > 1
        ]
        self.recipe: object = UNKNOWN
        self.microbatch: int | None = None
        self.filled, self.reused = counts.filled, counts.reused
        self.refreshed, self.repeated = counts.refreshed, counts.repeated

    def __reduce__(self) -> Any:
        # A copy of a module has weights and kept weights of its own, of which nothing is known.
        return _nothing_known, ()

    def has_these(self) -> bool:
        """Whether the module still consists of the modules that it consisted of."""
        return all(within.get(name) is child for within, name, child in self.edges)

    def take(self, recipe: object) -> None:
        """The weights as they are now are those that are kept, as soon as the forward has run."""
        for index, (within, name, watch) in enumerate(self.watched):
            if watch is None:
                self.watched[index] = (within, name, WeightWatch(within[name]))
            else:
                watch.take(within[name])
        self.recipe = recipe

    def is_fresh(self, recipe: object) -> bool:
        """Whether what is kept was made from the weights as they are, by this recipe."""
        if self.recipe is not recipe:
            if not _is_equal(self.recipe, recipe):
                return False
            self.recipe = recipe
        for within, name, watch in self.watched:
            weight = within.get(name)
            if weight is None or watch is None or not watch.is_same(weight):
                return False
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


def _is_equal(one: object, other: object) -> bool:
    return type(one) is type(other) and one == other
