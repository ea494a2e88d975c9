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


def state_of(made: nn.Module, *, beside: nn.Module) -> dict[str, Any]:
    """The attributes of a module that another one, of another class, does not have.

    Args:
        made: A new module of Transformer Engine, with parameters on meta, which are not taken.
        beside: The module that is to get the attributes.
    """
    has = vars(beside)
    return {name: value for name, value in vars(made).items() if name not in has}
