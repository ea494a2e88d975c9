"""Modules over the functions of ops."""

from automodel_fn.nn._lm_head import LMHead
from automodel_fn.nn._rms_norm import Float32RMSNorm

__all__ = ["Float32RMSNorm", "LMHead"]
