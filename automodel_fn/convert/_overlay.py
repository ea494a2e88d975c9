"""A module seen with other attributes, and functions seen with other globals."""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn


class Overlay:
    """What a forward gets as its `self`: the module's attributes, some of them replaced.

    Reading one that is not replaced reads the module's; what is set stays here.

    Example:
        >>> layer = nn.Linear(2, 2)
        >>> seen = Overlay(layer, weight=torch.eye(2), bias=None)
        >>> nn.Linear.forward(seen, torch.ones(2))
        tensor([1., 1.])
    """

    def __init__(self, module: Any, /, **replaced: Any) -> None:
        self.__dict__.update(replaced, overlaid_module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["overlaid_module"], name)


def innermost(function: Any) -> types.FunctionType | None:
    """The function beneath all that decorates it; None where it is none of Python's.

    Example:
        >>> innermost(nn.Linear.forward).__name__
        'forward'
    """
    while (below := getattr(function, "__wrapped__", None)) is not None:
        function = below
    return function if isinstance(function, types.FunctionType) else None


def names_in(cls: type[nn.Module]) -> frozenset[str]:
    """The globals and attributes that the forward of a class names in its code."""
    function = innermost(cls.forward)
    return frozenset(function.__code__.co_names) if function else frozenset()


def uses_super(cls: type[nn.Module]) -> bool:
    """Whether the forward of a class asks for `super()`, which needs the module itself."""
    function = innermost(cls.forward)
    return function is not None and "__class__" in function.__code__.co_freevars


def with_globals(function: Any, replaced: Mapping[str, Any]) -> Any:
    """A copy of a function, and of what decorates it, in which some global names mean others.

    The globals are those of the moment: what is patched in the module later on is not seen.

    Example:
        >>> def decorated():
        ...     return len("abc")
        >>> with_globals(decorated, {"len": lambda text: text * 2})()
        'abcabc'
    """
    below = getattr(function, "__wrapped__", None)
    if below is None:
        # Where there is one, torch.compile looks names up in the module of this name.
        namespace = {**function.__globals__, **replaced}
        namespace.pop("__name__", None)
        return _copied(function, namespace, function.__closure__)
    made = with_globals(below, replaced)
    cells = tuple(_with(cell, below, made) for cell in function.__closure__ or ())
    copied = _copied(function, function.__globals__, cells or None)
    vars(copied)["__wrapped__"] = made
    return copied


def _with(cell: types.CellType, below: Any, made: Any) -> types.CellType:
    return types.CellType(made) if cell.cell_contents is below else cell


def _copied(
    function: types.FunctionType,
    namespace: dict[str, Any],
    closure: tuple[types.CellType, ...] | None,
) -> types.FunctionType:
    copied = types.FunctionType(
        function.__code__, namespace, function.__name__, function.__defaults__, closure
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(function.__dict__)
    copied.__doc__, copied.__module__ = function.__doc__, function.__module__
    copied.__qualname__, copied.__annotations__ = function.__qualname__, function.__annotations__
    return copied


def probe_tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Values on the CPU that a forward is tried with: the same ones each time, of no ambient seed.

    Example:
        >>> torch.equal(probe_tensor(3), probe_tensor(3))
        True
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, device="cpu").to(dtype)


def is_close(found: Any, expected: torch.Tensor) -> bool:
    """Whether a trial gave what was expected: of that dtype, and almost all of it to the bit."""
    if not isinstance(found, torch.Tensor) or found.dtype != expected.dtype:
        return False
    if found.shape != expected.shape:
        return False
    same = (found == expected).double().mean().item()
    return same > 0.97 and torch.allclose(found.double(), expected.double(), rtol=0.02, atol=1e-6)
