"""The original's two flags, as the step of the calling thread outside of scopes."""

from __future__ import annotations

import types
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


def flag(name: str, module: str) -> Any:
    """The value of "IS_FIRST_MICROBATCH" or "IS_OPTIM_STEP"; AttributeError for other names."""
    if name == "IS_FIRST_MICROBATCH":
        return get_is_first_microbatch()
    if name == "IS_OPTIM_STEP":
        return get_is_optim_step()
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


class FlagModule(types.ModuleType):
    """Setting a flag as an attribute of the module sets it, as it would the original's global."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "IS_FIRST_MICROBATCH":
            set_is_first_microbatch(value)
        elif name == "IS_OPTIM_STEP":
            set_is_optim_step(value)
        else:
            super().__setattr__(name, value)
