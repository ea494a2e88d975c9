"""Precision for transformers: casts as plans, a step context, nothing ambient by accident."""

from automodel_fn.backend import Availability, probe
from automodel_fn.cast import (
    BoundaryHandle,
    CastPlan,
    CastReport,
    Finding,
    PlanDifference,
    SavedTensor,
    Snapshot,
    TensorCast,
    audit,
    cast_plan,
    fp32_boundaries,
    frozen_cast_plan,
    restore,
    snapshot,
    temporary_cast,
)
from automodel_fn.dtypes import bf16, fp16, fp32
from automodel_fn.errors import (
    AutomodelFnError,
    BackendUnavailableError,
    ConfigError,
    PartialCastError,
    PatchError,
    ScopeError,
    StalePlanError,
)
from automodel_fn.plans import Plan, Row, apply
from automodel_fn.step import (
    StepContext,
    accumulate,
    bind,
    checkpoint_context_fn,
    current_step,
    gradient_sync,
    invalidate,
    step_context,
)

__version__ = "0.1.0"

__all__ = [
    "AutomodelFnError",
    "Availability",
    "BackendUnavailableError",
    "BoundaryHandle",
    "CastPlan",
    "CastReport",
    "ConfigError",
    "Finding",
    "PartialCastError",
    "PatchError",
    "Plan",
    "PlanDifference",
    "Row",
    "SavedTensor",
    "ScopeError",
    "Snapshot",
    "StalePlanError",
    "StepContext",
    "TensorCast",
    "accumulate",
    "apply",
    "audit",
    "bf16",
    "bind",
    "cast_plan",
    "checkpoint_context_fn",
    "current_step",
    "fp16",
    "fp32",
    "fp32_boundaries",
    "frozen_cast_plan",
    "gradient_sync",
    "invalidate",
    "probe",
    "restore",
    "snapshot",
    "step_context",
    "temporary_cast",
]
