"""The patch record: which classes are wrapped, for whom, and what stood there before."""

from __future__ import annotations

import threading
from typing import Any

import attrs
from torch import nn

from automodel_fn.te._forward import Forward

_ABSENT: Any = object()


@attrs.define(eq=False)
class Patched:
    """One class: what stood in its `__dict__`, what is put there, and who needs it.

    Args:
        cls: The class.
        wrapped: The forward to put there.
        own_forward: What its `__dict__` held; a marker where the forward was inherited.
        holders: Those who took it and did not release it.
    """

    cls: type[nn.Module]
    wrapped: Forward = attrs.field(kw_only=True)
    own_forward: Any = attrs.field(
        default=attrs.Factory(lambda self: _own_forward(self.cls), takes_self=True), kw_only=True
    )
    holders: set[object] = attrs.field(factory=set[object], kw_only=True)


_record: dict[type[nn.Module], Patched] = {}
aware: dict[type[nn.Module], type[nn.Module]] = {}
"""The subclasses that see the step without a patch, by the class that they are of."""
lock = threading.RLock()


def is_wrapped(cls: type[nn.Module]) -> bool:
    """Whether somebody holds the class wrapped."""
    return cls in _record


def is_in_force(cls: type[nn.Module]) -> bool:
    """Whether our wrapper is the forward of a wrapped class, or is below one that says so."""
    forward: Any = _own_forward(cls)
    while forward is not None and forward is not _record[cls].wrapped:
        forward = getattr(forward, "__wrapped__", None)
    return forward is not None


def is_disturbed(cls: type[nn.Module], holder: object) -> bool:
    """Whether the class would be unwrapped without `holder` and is not as it was wrapped."""
    patched = _record.get(cls)
    return (
        patched is not None
        and patched.holders == {holder}
        and _own_forward(cls) is not patched.wrapped
    )


def is_strict(cls: type[nn.Module]) -> bool:
    """Whether some holder of the class wants a stale weight to be an error."""
    patched = _record.get(cls)
    return patched is not None and any(
        getattr(holder, "on_stale", "refresh") == "raise" for holder in patched.holders
    )


def take(patched: Patched, holder: object) -> None:
    """Wrap the class, if it is not yet, for one holder more."""
    # The record first: from there on an interruption at any point can be rolled back.
    is_new = patched.cls not in _record
    _record.setdefault(patched.cls, patched).holders.add(holder)
    if is_new:
        patched.cls.forward = patched.wrapped


def release(cls: type[nn.Module], holder: object) -> None:
    """The holder needs the class no more; after the last one it is as it was. Twice is fine."""
    patched = _record.get(cls)
    if patched is None:
        return
    patched.holders.discard(holder)
    if patched.holders:
        return
    # Not where ours is not there: the class refused it, or an interruption came before.
    if _own_forward(cls) is patched.wrapped:
        if patched.own_forward is _ABSENT:
            del cls.forward
        else:
            cls.forward = patched.own_forward
    del _record[cls]


def _own_forward(cls: type[nn.Module]) -> Any:
    return cls.__dict__.get("forward", _ABSENT)
