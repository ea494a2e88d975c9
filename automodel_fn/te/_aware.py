"""Subclasses of Transformer Engine's classes that see the step; the classes stay as they are."""

from __future__ import annotations

from functools import partial, wraps
from typing import Any

from torch import nn

from automodel_fn.step._ambient import eager_step
from automodel_fn.te._cache import flag_teller
from automodel_fn.te._forward import wrapped_forward
from automodel_fn.te._load import recipe_reader
from automodel_fn.te._record import aware, is_strict, lock


def step_aware(cls: type[nn.Module], field: str) -> type[Any]:
    """A subclass that behaves as `cls` does under `patch_te`, whether that is in force or not.

    Of the same name; its modules have the same state dict, and can be copied and pickled. Made once
    for each class.

    Args:
        cls: One of the classes of a TEClasses.
        field: Which of them.

    Raises:
        PatchError: Its forward cannot be wrapped.
    """
    with lock:
        if cls not in aware:
            aware[cls] = _subclass(cls, field)
        return aware[cls]


def _subclass(cls: type[nn.Module], field: str) -> type[Any]:
    @wraps(cls.forward)
    def inherited(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return cls.forward(self, *args, **kwargs)

    told = flag_teller(recipe_reader(), partial(is_strict, cls))

    def reduced(self: nn.Module, protocol: Any) -> Any:
        how = cls.__reduce_ex__(self, protocol)
        if type(self) is not made or not isinstance(how, tuple):
            return how
        # A class that was made here cannot be found by its name; the one below it can.
        return _unpickled, (cls, field), *how[2:]

    made = type(
        cls.__name__,
        (cls,),
        {
            "__doc__": cls.__doc__,
            "__module__": cls.__module__,
            "__qualname__": cls.__qualname__,
            "__reduce_ex__": reduced,
            "forward": wrapped_forward(inherited, field, eager_step, cls.__name__, told),
        },
    )
    return made


def _unpickled(cls: type[nn.Module], field: str) -> nn.Module:
    made: Any = step_aware(cls, field)
    return made.__new__(made)
