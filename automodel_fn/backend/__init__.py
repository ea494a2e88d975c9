"""Backends: what is asked for, what can run here, and what therefore will run, and why."""

from automodel_fn.backend._availability import Availability, Device, Package, Verdict
from automodel_fn.backend._config import BackendConfig
from automodel_fn.backend._fp8 import TEFp8Config
from automodel_fn.backend._probe import probe
from automodel_fn.backend._resolve import FieldResolution, Resolution, resolve

__all__ = [
    "Availability",
    "BackendConfig",
    "Device",
    "FieldResolution",
    "Package",
    "Resolution",
    "TEFp8Config",
    "Verdict",
    "probe",
    "resolve",
]
