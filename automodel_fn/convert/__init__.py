"""Backends of a model's modules, by plan: what becomes of each, and how it is taken back."""

from automodel_fn.convert._apply import apply_backend_plan
from automodel_fn.convert._entries import ModuleSwap
from automodel_fn.convert._plan import BackendPlan, SwapDifference
from automodel_fn.convert._planner import backend_plan
from automodel_fn.convert._report import SwapReport

__all__ = [
    "BackendPlan",
    "ModuleSwap",
    "SwapDifference",
    "SwapReport",
    "apply_backend_plan",
    "backend_plan",
]
