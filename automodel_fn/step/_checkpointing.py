"""Let the activation checkpoints of a Hugging Face model carry the step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from automodel_fn.errors import ConfigError
from automodel_fn.handles import Handle
from automodel_fn.step._bind import bind

_FUNCTION = "_gradient_checkpointing_func"


class CarryHandle(Handle):
    """The step is carried until `remove()`; a context manager.

    Example:
        >>> CarryHandle(()).remove()
    """

    __slots__ = ("_carrying",)

    def __init__(self, carrying: tuple[tuple[nn.Module, Callable[..., Any], Any], ...]) -> None:
        self._carrying = carrying

    def remove(self) -> None:
        """Put back what checkpointed the modules before; not where it was changed since."""
        for module, carries, original in self._carrying:
            if vars(module).get(_FUNCTION) is carries:
                setattr(module, _FUNCTION, original)
        self._carrying = ()


def carry_step(model: nn.Module) -> CarryHandle:
    """Let every recompute of a Hugging Face model see its forward's step, wherever it runs.

    Call it after the model's `gradient_checkpointing_enable` (or its newer name,
    `activation_checkpointing_enable`), and again if that is called again; for `use_reentrant` True
    and False. Needed only where the step is not found by itself: a backward that another Python
    thread calls, and the inner part of nested reentrant checkpoints. Elsewhere it changes nothing.

    Args:
        model: A model, or a module that has some inside, with checkpointing enabled.

    Returns:
        A CarryHandle: a context manager, with `remove()`.

    Raises:
        ConfigError: No module of the model is checkpointed.

    Example:
        >>> try:
        ...     carry_step(nn.Linear(2, 2))
        ... except ConfigError as error:
        ...     print("gradient_checkpointing_enable" in str(error))
        True
    """
    found = [
        (module, vars(module)[_FUNCTION]) for module in model.modules() if _FUNCTION in vars(module)
    ]
    if not found:
        raise ConfigError(
            f"model={type(model).__name__} has no module that is checkpointed; call its "
            "gradient_checkpointing_enable (or activation_checkpointing_enable) first."
        )
    carrying = tuple(
        (module, partial(_checkpointed, original), original) for module, original in found
    )
    for module, carries, _ in carrying:
        setattr(module, _FUNCTION, carries)
    return CarryHandle(carrying)


def _checkpointed(
    original: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    return original(bind(function), *args, **kwargs)
