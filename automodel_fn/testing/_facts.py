"""What a cast could damage, written down, and how two such records differ."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

import attrs
import torch
from torch import nn

from automodel_fn.testing._twin import bits_of, is_plain, storage_key, tensors_of

_LINES_SHOWN = 10


@attrs.frozen
class Fact:
    """What one name of a model stands for."""

    tensor: torch.Tensor = attrs.field(eq=False, repr=False)
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: int
    requires_grad: bool
    bits: torch.Tensor | None = attrs.field(eq=False, repr=False)
    grad: Fact | None = attrs.field(eq=False, repr=False)


Facts = Mapping[str, Fact]


def fact_of(tensor: torch.Tensor) -> Fact:
    """The record of a tensor and of its gradient."""
    plain = is_plain(tensor)
    return Fact(
        tensor,
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()) if plain else (),
        offset=tensor.storage_offset() if plain else 0,
        storage=storage_key(tensor) if plain else 0,
        requires_grad=tensor.requires_grad,
        bits=bits_of(tensor) if plain and not tensor.is_meta else None,
        grad=None if tensor.grad is None else fact_of(tensor.grad),
    )


def facts_of(model: nn.Module) -> Facts:
    """The record of every name of a model."""
    return {name: fact_of(tensor) for name, tensor in tensors_of(model)}


def same_bits(left: Fact, right: Fact) -> bool:
    """Whether two records agree in dtype, shape and every bit."""
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    if left.bits is None or right.bits is None:
        return left.bits is right.bits
    return torch.equal(left.bits, right.bits)


def values_differ(found: Facts, expected: Facts) -> Iterator[str]:
    """Every name whose value is another: dtype, shape, bits, trainability, gradient."""
    yield from _each(found, expected, _value_differs)


def all_differs(found: Facts, expected: Facts) -> Iterator[str]:
    """Every name that stands for another tensor, another piece of memory, or another value."""

    def differs(now: Fact, then: Fact) -> str:
        if now.tensor is not then.tensor:
            return "is another tensor object"
        if (now.storage, now.offset, now.stride) != (then.storage, then.offset, then.stride):
            return "lies in other memory"
        return _value_differs(now, then)

    yield from _each(found, expected, differs)


def _each(found: Facts, expected: Facts, differs: Callable[[Fact, Fact], str]) -> Iterator[str]:
    for name in dict.fromkeys([*expected, *found]):
        if name not in found or name not in expected:
            yield f"{name} {'is gone' if name in expected else 'is new'}"
        elif text := differs(found[name], expected[name]):
            yield f"{name} {text}"


def _value_differs(now: Fact, then: Fact) -> str:
    if now.dtype != then.dtype:
        return f"is {now.dtype}, expected {then.dtype}"
    if now.requires_grad != then.requires_grad:
        return f"has requires_grad={now.requires_grad}, expected {then.requires_grad}"
    if not same_bits(now, then):
        return f"has other bits than expected: {_first_bits(now, then)}"
    if now.grad is None or then.grad is None:
        return "" if now.grad is then.grad else "lost or gained its gradient"
    text = _value_differs(now.grad, then.grad)
    return f"has a gradient that {text}" if text else ""


def _first_bits(now: Fact, then: Fact) -> str:
    if now.bits is None or then.bits is None or now.shape != then.shape or not len(now.bits):
        return f"shape {now.shape}, expected {then.shape}"
    size = now.dtype.itemsize
    place = int((now.bits != then.bits).nonzero()[0]) // size * size
    found, expected = (
        bytes(reversed(fact.bits[place : place + size].tolist())).hex()
        for fact in (now, then)
        if fact.bits is not None
    )
    return f"0x{found} at element {place // size}, expected 0x{expected}"


def demand_none(head: str, complaints: Iterable[str]) -> None:
    """Raise if there are complaints.

    Raises:
        AssertionError: With the head and the first complaints.
    """
    lines = list(complaints)
    if lines:
        more = [f"... and {len(lines) - _LINES_SHOWN} more"] if len(lines) > _LINES_SHOWN else []
        raise AssertionError("\n  ".join([f"{head}:", *lines[:_LINES_SHOWN], *more]))


def demand(holds: bool, complaint: str) -> None:
    """Raise if something does not hold; unlike `assert`, also under `python -O`.

    Raises:
        AssertionError: With the complaint.
    """
    if not holds:
        raise AssertionError(complaint)
