"""Wrap the forwards of Transformer Engine's classes, and unwrap them again."""

from __future__ import annotations

from functools import partial
from typing import Literal, get_args

from torch import nn

from automodel_fn.errors import ConfigError, PatchError, itemized
from automodel_fn.handles import Handle
from automodel_fn.step._ambient import eager_step
from automodel_fn.te._cache import RecipeReader, flag_teller
from automodel_fn.te._classes import TEClasses
from automodel_fn.te._forward import StepReader, wrapped_forward
from automodel_fn.te._load import load_te_classes, recipe_reader
from automodel_fn.te._record import (
    Patched,
    is_disturbed,
    is_in_force,
    is_strict,
    is_wrapped,
    lock,
    release,
    take,
)

OnStale = Literal["refresh", "raise"]


class PatchHandle(Handle):
    """The patch, for as long as somebody needs it; a context manager.

    The classes are wrapped while at least one handle is left.

    Example:
        >>> from automodel_fn.step._ambient import current_step
        >>> from automodel_fn.te._patch import patch_classes
        >>> from automodel_fn.testing import te_stand_ins
        >>> classes = te_stand_ins()
        >>> with patch_classes(classes, current_step) as handle:
        ...     handle.is_active
        True
        >>> handle
        PatchHandle(is_active=False)
    """

    __slots__ = ("_classes", "_is_active", "_on_stale")

    def __init__(self, classes: tuple[type[nn.Module], ...], on_stale: OnStale) -> None:
        self._classes = classes
        self._is_active = True
        self._on_stale: OnStale = on_stale

    @property
    def on_stale(self) -> OnStale:
        """What becomes of a kept weight that is stale: "refresh" or "raise"."""
        return self._on_stale

    @property
    def is_active(self) -> bool:
        """Whether this handle has not been removed."""
        return self._is_active

    def remove(self) -> None:
        """Give this handle back; with the last one the classes are as they were. Twice is fine.

        Raises:
            PatchError: Someone else changed a `forward` since; nothing was changed, and this
                handle is still active, so that it can be removed once theirs is gone.
        """
        with lock:
            if not self._is_active:
                return
            disturbed = [cls for cls in self._classes if is_disturbed(cls, self)]
            if disturbed:
                raise PatchError(_disturbance(disturbed, len(self._classes)))
            self._release()

    def _release(self) -> None:
        for cls in self._classes:
            release(cls, self)
        self._is_active = False

    def __repr__(self) -> str:
        return f"PatchHandle(is_active={self._is_active})"


def patch_te(*, on_stale: OnStale = "refresh") -> PatchHandle:
    """Let Transformer Engine's modules see the step context, and infer shapes without memory.

    `Linear`, `GroupedLinear`, `LayerNormLinear`, `LayerNormMLP`, `MultiheadAttention` and
    `TransformerLayer` get `is_first_microbatch` from `current_step()` where their caller does not
    give it; an argument that the caller gives wins, also None. An input without memory (meta, fake)
    gives the four linears, `RMSNorm` and `LayerNorm` an output of the right shape and dtype with an
    autograd edge, as pipeline shape inference needs. All other arguments pass through unchanged.

    Each call has its own handle; the classes are wrapped once, and unwrapped with the last handle.

    A quantized weight is reused in a later microbatch only if the weight has not changed since it
    was made, nor the recipe; otherwise it is made anew, and counted (`cache_counts`). What cannot
    be noticed needs `invalidate`. A module that runs twice in one first microbatch reuses it, too.
    With `fuse_wgrad_accumulation` gradients are always added to `main_grad`, as without caching.

    Args:
        on_stale: "refresh", or "raise": a weight or a recipe that has changed between the first
            microbatch and a later one is a StaleWeightError, as long as this handle is active.

    Returns:
        A PatchHandle: a context manager, with `remove()`.

    Raises:
        BackendUnavailableError: Transformer Engine cannot be imported here, or is too old.
        ConfigError: `on_stale` is neither.
        PatchError: A `forward` is not one that can be wrapped.

    Source:
        `_patch_te_modules` (NeMo Automodel), which wraps three classes for good, renames an
        argument and reads a global flag.

    Example:
        >>> from automodel_fn import BackendUnavailableError
        >>> try:
        ...     with patch_te():
        ...         pass
        ... except BackendUnavailableError as error:
        ...     print("Transformer Engine" in str(error))
        True
    """
    _check(on_stale)
    classes = load_te_classes()
    return patch_classes(classes, eager_step, recipe_reader(), on_stale)


def patch_classes(
    classes: TEClasses,
    read_step: StepReader,
    read_recipe: RecipeReader = lambda: "quantized",
    on_stale: OnStale = "refresh",
) -> PatchHandle:
    """As `patch_te`, for the classes of a record, and any reader of the step and of the recipe.

    Raises:
        ConfigError: `on_stale` is none of its values.
        PatchError: A `forward` is not one that can be wrapped, or ours was replaced; all are
            listed and nothing was changed.
    """
    _check(on_stale)
    with lock:
        to_take = _patched(classes, read_step, read_recipe)
        handle = PatchHandle(tuple(patched.cls for patched in to_take), on_stale)
        try:
            for patched in to_take:
                take(patched, handle)
        except BaseException:
            handle._release()
            raise
        return handle


def _check(on_stale: object) -> None:
    if on_stale not in get_args(OnStale):
        raise ConfigError(f"on_stale={on_stale!r} must be 'refresh' or 'raise'.")


def _patched(
    classes: TEClasses, read_step: StepReader, read_recipe: RecipeReader
) -> tuple[Patched, ...]:
    """What is to be wrapped, and how; changes nothing."""
    made: list[Patched] = []
    wrong: list[str] = []
    for field, cls in classes.items():
        if is_wrapped(cls) and not is_in_force(cls):
            wrong.append(f"{cls.__name__}.forward is {cls.forward!r}")
            continue
        try:
            told = flag_teller(read_recipe, partial(is_strict, cls))
            wrapped = wrapped_forward(cls.forward, field, read_step, cls.__name__, told)
            made.append(Patched(cls, wrapped=wrapped))
        except PatchError as error:
            wrong.append(str(error))
    if wrong:
        raise PatchError(
            itemized(
                f"{len(wrong)} of {len(classes.items())} forwards cannot be wrapped, or were "
                "replaced since they were; expected them as Transformer Engine left them:",
                wrong,
                "Undo what replaced them, then call patch_te again.",
            )
        )
    return tuple(made)


def _disturbance(classes: list[type[nn.Module]], num_classes: int) -> str:
    return itemized(
        f"{len(classes)} of {num_classes} forwards were changed by someone else since patch_te(); "
        "expected our wrapper on top, and nothing was unwrapped:",
        [f"{cls.__name__}.forward is {cls.__dict__.get('forward')!r}" for cls in classes],
        "Undo the other change first, then call remove() again.",
    )
