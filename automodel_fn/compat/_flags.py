"""The original's two flags, as the step of the calling thread outside of scopes."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from automodel_fn.step._ambient import current_step
from automodel_fn.step._base import set_base_step
from automodel_fn.step._context import StepContext


def get_is_optim_step() -> bool:
    """Whether the step in force is the last microbatch before the optimizer."""
    return current_step().optim_step


def set_is_optim_step(value: bool) -> None:
    """Set it for this thread outside of scopes; ScopeError inside a `step_context`."""
    set_base_step(StepContext(current_step().first_microbatch, optim_step=value))


def get_is_first_microbatch() -> bool | None:
    """Whether the step in force is a first microbatch; None caches nothing."""
    return current_step().first_microbatch


def set_is_first_microbatch(value: bool | None) -> None:
    """Set it for this thread outside of scopes; ScopeError inside a `step_context`."""
    set_base_step(StepContext(value, optim_step=current_step().optim_step))


def _flag(name: str, read: Callable[[], bool | None], write: Callable[[Any], None]) -> Any:
    """A property of a module: a flag that can also be deleted, and is then missing until it is set.

    `unittest.mock` deletes what it has patched, and sets what was there before only where it then
    finds nothing; pytest's monkeypatch sets at once what is a property.
    """
    mark = f"_{name}_is_deleted"

    def demand(module: types.ModuleType) -> None:
        if mark in vars(module):
            raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")

    def get(module: types.ModuleType) -> bool | None:
        demand(module)
        return read()

    def put(module: types.ModuleType, value: Any) -> None:
        write(value)
        vars(module).pop(mark, None)

    def delete(module: types.ModuleType) -> None:
        demand(module)
        vars(module)[mark] = True

    return property(get, put, delete)


class FlagModule(types.ModuleType):
    """A module of which the flags are attributes, as the original's globals are."""

    IS_FIRST_MICROBATCH = _flag(
        "IS_FIRST_MICROBATCH", get_is_first_microbatch, set_is_first_microbatch
    )
    IS_OPTIM_STEP = _flag("IS_OPTIM_STEP", get_is_optim_step, set_is_optim_step)

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), "IS_FIRST_MICROBATCH", "IS_OPTIM_STEP"})
