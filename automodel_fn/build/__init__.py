"""Layers by backend, for people who write their own models: one builder a kind."""

from automodel_fn.build._linear import linear
from automodel_fn.build._rms_norm import rms_norm

__all__ = ["linear", "rms_norm"]
