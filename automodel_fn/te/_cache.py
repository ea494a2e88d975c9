"""What is known of the quantized weights that a module keeps, and what to tell it about them.

Transformer Engine's `is_first_microbatch` means two things: make the kept weights anew, and
overwrite `main_grad` in the backward. Here the first follows the weights, and the second is left
out: with fused accumulation the kept weights are dropped, so that the module makes new ones, and is
told False, so that it adds to `main_grad` as it does without caching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import attrs
import torch
from torch import nn

from automodel_fn.errors import StaleWeightError
from automodel_fn.ops._experts import PRODUCT
from automodel_fn.step._ambient import current_microbatch
from automodel_fn.step._autograd import current_node
from automodel_fn.te._kept import UNKNOWN, CacheCounts, Kept

RecipeReader = Callable[[], object]
Told = Callable[[nn.Module, bool], bool | None]
"""What a module is told as `is_first_microbatch`; the forward follows."""
_ATTRIBUTE = "_automodel_fn_cache"


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


def _caches(module: nn.Module) -> Iterator[Kept]:
    # Experts multiply by modules that are no parts of them.
    beside: Iterable[nn.Module] = getattr(vars(module).get(PRODUCT), "modules", tuple)()
    for part in (module, *beside):
        cache = vars(part).get(_ATTRIBUTE)
        if cache is not None:
            yield cache


def flag_teller(read_recipe: RecipeReader, is_strict: Callable[[], bool]) -> Told:
    """What tells a module, in a microbatch that is the first one or is not, which of both it is.

    Before it does, it drops what the module keeps where that was not made from its weights as they
    are. Every forward asks it: one function, since each more costs as much as what it asks.

    Args:
        read_recipe: Gives the recipe in force; None where nothing is quantized.
        is_strict: Whether a weight that has changed is an error: a StaleWeightError, raised where
            it is told.
    """

    def told(module: nn.Module, first: bool) -> bool | None:
        cache: Kept | None = module.__dict__.get(_ATTRIBUTE)
        if cache is None or (cache.edges and not cache.has_these()):
            cache = Kept(module, CacheCounts() if cache is None else cache.counts())
            module.__dict__[_ATTRIBUTE] = cache
        recipe = read_recipe()
        if recipe is None:
            return first and not cache.fuses  # Without FP8 nothing is kept.
        is_repeated = first and not _begins(cache)
        if first and not is_repeated:
            return _filling(cache, module, recipe)
        if (cache.recipe is recipe or cache.is_by(recipe)) and cache.watch.are_same():
            if is_repeated:
                cache.repeated += 1
            else:
                cache.reused += 1
            return False
        return _refreshing(cache, module, recipe, is_strict)

    return told


def _begins(cache: Kept) -> bool:
    """Whether this call is the module's first one in its first microbatch."""
    microbatch = current_microbatch()
    if microbatch is None:
        return True
    is_new = microbatch != cache.microbatch
    cache.microbatch = microbatch
    return is_new


def _filling(cache: Kept, module: nn.Module, recipe: object) -> bool | None:
    if cache.fuses and not _may_drop(module):
        return None
    cache.take(module, recipe)
    cache.filled += 1
    if cache.fuses:
        cache.drop()
        return False
    return True


def _refreshing(
    cache: Kept, module: nn.Module, recipe: object, is_strict: Callable[[], bool]
) -> bool | None:
    if not _may_drop(module):
        return None
    if cache.recipe is UNKNOWN:
        cache.filled += 1
    else:
        if is_strict():
            raise StaleWeightError(_staleness(cache, module, recipe))
        cache.refreshed += 1
    cache.drop()
    cache.take(module, recipe)
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
    cache: Kept | None = getattr(module, "__dict__", {}).get(_ATTRIBUTE)
    if cache is not None and current_node() is None:
        cache.recipe, cache.microbatch = UNKNOWN, None


def _staleness(cache: Kept, module: nn.Module, recipe: object) -> str:
    what = ", ".join(cache.watch.changed()) or f"the recipe, now {recipe!r}"
    return (
        f"on_stale='raise': {type(module).__name__} keeps quantized weights that are to be reused "
        f"(first_microbatch=False), and were not made from what is there now; changed: {what}. "
        "Begin a new optimizer step with first_microbatch=True after such a change, run without "
        "caching (first_microbatch=None), or use on_stale='refresh'."
    )
