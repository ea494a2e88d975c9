"""What is known of a module whose class was exchanged for another one, and how to make one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from torch import nn

from automodel_fn.convert._covers import uncovered

SETTINGS = "automodel_fn_settings"
OWN = "automodel_fn_own_class"
ADDED = "_automodel_fn_added"
"""The attribute of a module that lists, by field, which attributes a variant has added to it."""

Settings = tuple[tuple[str, str], ...]
Namespace = dict[str, Any]


def _nothing(module: nn.Module, choice: str) -> Mapping[str, Any]:
    return {}


def _no_bases(choice: str) -> tuple[type[Any], ...]:
    return ()


@attrs.frozen
class Behaviour:
    """How a class becomes one that runs by another backend, in the respect of one field.

    Args:
        namespace: What the subclass of a class has, for a choice.
        bases: The classes that it has before that class.
        state: The attributes that a module needs for it; those that it has already stay.
    """

    namespace: Callable[[type[Any], str], Namespace]
    bases: Callable[[str], tuple[type[Any], ...]] = attrs.field(default=_no_bases, kw_only=True)
    state: Callable[[nn.Module, str], Mapping[str, Any]] = attrs.field(
        default=_nothing, kw_only=True
    )


def settings_of(module: nn.Module) -> dict[str, str]:
    """What was set for a module, by field.

    Example:
        >>> settings_of(nn.Linear(2, 2))
        {}
    """
    return dict(getattr(type(module), SETTINGS, ()))


def own_class(cls: type[Any]) -> type[Any]:
    """The class without what was made of it here, or by FSDP2; another class is its own.

    Example:
        >>> own_class(nn.Linear) is nn.Linear
        True
    """
    inner = uncovered(cls)
    return getattr(inner, OWN, inner)


def is_covered(cls: type[Any]) -> bool:
    """Whether somebody other than FSDP2 has made a class over a variant."""
    inner = uncovered(cls)
    return hasattr(inner, SETTINGS) and SETTINGS not in vars(inner)
