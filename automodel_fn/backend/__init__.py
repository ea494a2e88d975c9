"""What can run here: versions, devices, packages, and for each backend why not."""

from automodel_fn.backend._availability import Availability, Device, Package, Verdict
from automodel_fn.backend._probe import probe

__all__ = ["Availability", "Device", "Package", "Verdict", "probe"]
