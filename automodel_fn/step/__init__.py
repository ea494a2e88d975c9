"""The step context: an immutable value, how it is put in force, and who sees it."""

from automodel_fn.step._ambient import current_step, step_context
from automodel_fn.step._bind import bind, checkpoint_context_fn
from automodel_fn.step._checkpointing import CarryHandle, carry_step
from automodel_fn.step._context import StepContext, accumulate
from automodel_fn.step._freshness import invalidate
from automodel_fn.step._sync import gradient_sync

__all__ = [
    "CarryHandle",
    "StepContext",
    "accumulate",
    "bind",
    "carry_step",
    "checkpoint_context_fn",
    "current_step",
    "gradient_sync",
    "invalidate",
    "step_context",
]
