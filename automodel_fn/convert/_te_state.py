"""What a module needs to have beside its parameters to be one of Transformer Engine's."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn

NO_EXTRA_STATE: Mapping[str, Any] = MappingProxyType(
    {
        "get_extra_state": nn.Module.get_extra_state,
        "set_extra_state": nn.Module.set_extra_state,
    }
)
"""For a class: no `_extra_state` in state dicts, which then have the keys of the own class."""
