"""Casting: a plan that one can read, an apply that is exact, and the way back."""

from automodel_fn.cast._apply import apply_cast_plan as apply_cast_plan
from automodel_fn.cast._audit import audit
from automodel_fn.cast._boundaries import BoundaryHandle, fp32_boundaries
from automodel_fn.cast._compare import Finding
from automodel_fn.cast._entries import TensorCast
from automodel_fn.cast._plan import CastPlan, PlanDifference
from automodel_fn.cast._planners import cast_plan, frozen_cast_plan
from automodel_fn.cast._range import RangeLoss
from automodel_fn.cast._report import CastReport
from automodel_fn.cast._snapshot import SavedTensor, Snapshot, restore, snapshot
from automodel_fn.cast._temporary import temporary_cast

__all__ = [
    "BoundaryHandle",
    "CastPlan",
    "CastReport",
    "Finding",
    "PlanDifference",
    "RangeLoss",
    "SavedTensor",
    "Snapshot",
    "TensorCast",
    "audit",
    "cast_plan",
    "fp32_boundaries",
    "frozen_cast_plan",
    "restore",
    "snapshot",
    "temporary_cast",
]
