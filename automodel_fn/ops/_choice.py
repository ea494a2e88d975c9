"""Which implementation of an operation runs, as data."""

from __future__ import annotations

from typing import Literal

import attrs


@attrs.frozen
class KernelChoice:
    """What computes an operation for given inputs, and why.

    Args:
        name: "triton" (a fused kernel of this package) or "torch" (torch's own operators).
        reason: Why this one, such as "x is on cpu".

    Example:
        >>> KernelChoice("torch", reason="x is on cpu").name
        'torch'
    """

    name: Literal["triton", "torch"]
    reason: str = attrs.field(kw_only=True)
