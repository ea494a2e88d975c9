"""Layers by backend, for people who write their own models: one builder a kind."""

from automodel_fn.build._attention import attention, rope
from automodel_fn.build._experts import experts, gate
from automodel_fn.build._linear import linear
from automodel_fn.build._rms_norm import rms_norm

__all__ = ["attention", "experts", "gate", "linear", "rms_norm", "rope"]
