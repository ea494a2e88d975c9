"""What is known of the quantized weights that a module keeps, and what to tell it about them.

Transformer Engine's `is_first_microbatch` means two things: make the kept weights anew, and
overwrite `main_grad` in the backward. Here the first follows the weights, and the second is left
out: with fused accumulation the kept weights are dropped, so that the module makes new ones, and is
told False, so that it adds to `main_grad` as it does without caching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from automodel_fn.errors import StaleWeightError
from automodel_fn.step._ambient import current_microbatch
from automodel_fn.step._autograd import current_node
from automodel_fn.step._freshness import WeightWatch

RecipeReader = Callable[[], object]
_ATTRIBUTE = "_automodel_fn_cache"
_WORKSPACES = "_fp8_workspaces"
_UNKNOWN = object()


@attrs.frozen
class CacheCounts:
    """How often modules were told what of their quantized weights.

    Args:
        filled: In a first microbatch: make them anew.
        reused: In a later one: use those that are kept.
        refreshed: In a later one, after a weight or the recipe had changed: those that were kept
            are dropped, and made anew.
        repeated: In a first one that had run the module already: use those that are kept.
    """

    filled: int = attrs.field(default=0, kw_only=True)
    reused: int = attrs.field(default=0, kw_only=True)
    refreshed: int = attrs.field(default=0, kw_only=True)
    repeated: int = attrs.field(default=0, kw_only=True)


class _Cache:
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
        self.holders = [part for part in modules if _WORKSPACES in vars(part)]
        self.fuses = any(getattr(part, "fuse_wgrad_accumulation", False) for part in self.holders)
        self.watched: list[tuple[dict[str, Any], str, WeightWatch | None]] = [
            (within._parameters, name, None)
            for within in modules
            for name, parameter in within._parameters.items()
            if parameter is not None and not is_lazy(parameter) and parameter.dim() > 1
        ]
        self.recipe: object = _UNKNOWN
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
            vars(part)[_WORKSPACES].clear()

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


def cache_counts(model: nn.Module) -> CacheCounts:
    """How often the step told the modules of a model to make their quantized weights, or not to.

    Of modules of Transformer Engine under `patch_te`, and of those that `build` made. Counted where
    the step decided, not where a caller gave `is_first_microbatch`; recomputes are counted too, and
    the parts of a TransformerLayer are in the count of the layer.

    Args:
        model: A module; all beneath it are added up.

    Example:
        >>> cache_counts(nn.Linear(2, 2))
        CacheCounts(filled=0, reused=0, refreshed=0, repeated=0)
    """
    found = [cache.counts() for module in model.modules() for cache in _caches(module)]
    names = [field.name for field in attrs.fields(CacheCounts)]
    return CacheCounts(**{name: sum(getattr(one, name) for one in found) for name in names})


def _caches(module: nn.Module) -> Iterator[_Cache]:
    cache = vars(module).get(_ATTRIBUTE)
    if cache is not None:
        yield cache


def microbatch_flag(
    read_recipe: RecipeReader, is_strict: Callable[[], bool], module: nn.Module, first: bool
) -> bool | None:
    """What a module is to be told as `is_first_microbatch`, in a microbatch that is one or is not.

    Drops what the module keeps where that was not made from its weights as they are.

    Args:
        read_recipe: Gives the recipe in force; None where nothing is quantized.
        is_strict: Whether a weight that has changed is an error.
        module: The module, whose forward is to follow.
        first: Whether the microbatch is the first one.

    Raises:
        StaleWeightError: A weight has changed since the first microbatch, and that is an error.
    """
    cache: _Cache | None = vars(module).get(_ATTRIBUTE)
    if cache is None or (cache.edges and not cache.has_these()):
        cache = _Cache(module, CacheCounts() if cache is None else cache.counts())
        vars(module)[_ATTRIBUTE] = cache
    recipe = read_recipe()
    if recipe is None:
        return first and not cache.fuses  # Without FP8 nothing is kept.
    is_repeated = False
    if first:
        microbatch = current_microbatch()
        is_repeated = microbatch is not None and microbatch == cache.microbatch
        if not is_repeated:
            if microbatch is not None:
                cache.microbatch = microbatch
            return _filling(cache, module, recipe)
    if cache.is_fresh(recipe):
        cache.reused += not is_repeated
        cache.repeated += is_repeated
        return False
    return _refreshing(cache, module, recipe, is_strict)


def _filling(cache: _Cache, module: nn.Module, recipe: object) -> bool | None:
    if cache.fuses and not _may_drop(module):
        return None
    cache.take(recipe)
    cache.filled += 1
    if cache.fuses:
        cache.drop()
        return False
    return True


def _refreshing(
    cache: _Cache, module: nn.Module, recipe: object, is_strict: Callable[[], bool]
) -> bool | None:
    if not _may_drop(module):
        return None
    if cache.recipe is _UNKNOWN:
        cache.filled += 1
    else:
        if is_strict():
            raise StaleWeightError(_staleness(cache, module, recipe))
        cache.refreshed += 1
    cache.drop()
    cache.take(recipe)
    return False


def _may_drop(module: nn.Module) -> bool:
    """Whether no CUDA graph replays, or is being made of, what the module keeps."""
    if "forward" in vars(module):
        return False
    return not (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())


def forget(module: nn.Module) -> None:
    """The forward failed: what the module keeps may be of weights before or after.

    Not in a recompute, which ends early by an error when it has made all that is needed.
    """
    cache: _Cache | None = getattr(module, "__dict__", {}).get(_ATTRIBUTE)
    if cache is not None and current_node() is None:
        cache.recipe, cache.microbatch = _UNKNOWN, None


def _staleness(cache: _Cache, module: nn.Module, recipe: object) -> str:
    changed = [
        name
        for within, name, watch in cache.watched
        if watch is None or name not in within or not watch.is_same(within[name])
    ]
    what = ", ".join(changed) or f"the recipe, now {recipe!r}"
    return (
        f"on_stale='raise': {type(module).__name__} keeps quantized weights that are to be reused "
        f"(first_microbatch=False), and were not made from what is there now; changed: {what}. "
        "Begin a new optimizer step with first_microbatch=True after such a change, run without "
        "caching (first_microbatch=None), or use on_stale='refresh'."
    )
