"""The step of a thread outside of every scope: off, unless code written for flags sets it."""

from __future__ import annotations

from automodel_fn.errors import ScopeError
from automodel_fn.step._carrier import base_step, change_base, open_entry
from automodel_fn.step._context import StepContext


def set_base_step(step: StepContext) -> None:
    """Let `step` be in force in this thread outside of every scope, until it is set again.

    For code that sets flags and never resets them; new code enters a `step_context`, which ends.
    A recompute sees the base step of its forward, other threads do not see it, and scopes inherit
    from it.

    Raises:
        ScopeError: A scope is open here: it would hide the new step, and end in the old one.

    Source:
        `set_is_first_microbatch` and `set_is_optim_step` (NeMo Automodel), for the whole process.

    Example:
        >>> from automodel_fn.step._ambient import current_step
        >>> set_base_step(StepContext(first_microbatch=True))
        >>> current_step()
        StepContext(first_microbatch=True, optim_step=False)
        >>> set_base_step(StepContext())
    """
    entry = open_entry()
    if entry is not None:
        raise ScopeError(
            f"the step outside of scopes cannot be set to {step} inside the scope of {entry.step}; "
            "enter another step_context, or leave this one first."
        )
    if step != base_step():
        change_base(step)
