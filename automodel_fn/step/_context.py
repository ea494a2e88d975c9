"""The step context as a value, and the loop that produces one a microbatch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import attrs

from automodel_fn.errors import ConfigError

BatchT = TypeVar("BatchT")


def _three_valued(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if value is not None and not isinstance(value, bool):
        raise ConfigError(f"{attribute.name}={value!r} must be True, False or None (off).")


def _two_valued(instance: object, attribute: attrs.Attribute[Any], value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{attribute.name}={value!r} must be True or False.")


@attrs.frozen
class StepContext:
    """What a forward may know about the optimizer step that it belongs to.

    Immutable and hashable; change one with `attrs.evolve`. Replaces the module globals
    `IS_FIRST_MICROBATCH` and `IS_OPTIM_STEP` of NeMo Automodel.

    Args:
        first_microbatch: True in the first microbatch of an optimizer step (quantized weights are
            made anew), False in the later ones (they are reused), None for off (no caching).
            The same three values as Transformer Engine's `is_first_microbatch`.
        optim_step: True in the last microbatch, after whose backward the optimizer steps.

    Raises:
        ConfigError: A value that is none of these.

    Example:
        >>> StepContext(first_microbatch=True)
        StepContext(first_microbatch=True, optim_step=False)
        >>> StepContext() == StepContext(first_microbatch=None, optim_step=False)
        True
    """

    first_microbatch: bool | None = attrs.field(default=None, validator=_three_valued)
    optim_step: bool = attrs.field(default=False, kw_only=True, validator=_two_valued)


OFF = StepContext()
"""What holds outside of every scope: nothing is cached and no step is due."""


def accumulate(
    batches: Iterable[BatchT], num_microbatches: int
) -> Iterator[tuple[StepContext, BatchT]]:
    """Pair each batch with its step context; enters no scope.

    `first_microbatch` is True on the first batch of every optimizer step and False on the others;
    `optim_step` is True on the last one, also where the batches run out early. For that it reads
    one batch ahead.

    Args:
        batches: The microbatches, in order.
        num_microbatches: How many make one optimizer step; at least 1.

    Returns:
        An iterator over (step, batch).

    Raises:
        ConfigError: `num_microbatches` is not a whole number of at least 1; raised at the call.

    Example:
        >>> [(s.first_microbatch, s.optim_step, b) for s, b in accumulate("abc", 2)]
        [(True, False, 'a'), (False, True, 'b'), (True, True, 'c')]
    """
    if isinstance(num_microbatches, bool) or not isinstance(num_microbatches, int):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"num_microbatches={num_microbatches!r} must be a whole number.")
    if num_microbatches < 1:
        raise ConfigError(f"num_microbatches={num_microbatches} must be at least 1.")
    return _pairs(iter(batches), num_microbatches)


def _pairs(
    batches: Iterator[BatchT], num_microbatches: int
) -> Iterator[tuple[StepContext, BatchT]]:
    done = object()
    index = 0
    batch: Any = next(batches, done)
    while batch is not done:
        following: Any = next(batches, done)
        last = index == num_microbatches - 1 or following is done
        yield StepContext(index == 0, optim_step=last), batch
        index = 0 if last else index + 1
        batch = following
