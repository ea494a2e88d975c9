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
    """What one name of a model stands for.

    `bits_where_shared` are further bits that an element may have, each for all elements: where
    views overlap, one piece of memory has to serve them all. `attached` are its Python attributes
    and its hooks.
    """

    tensor: torch.Tensor = attrs.field(eq=False, repr=False)
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    storage: int
    requires_grad: bool
    bits: torch.Tensor | None = attrs.field(eq=False, repr=False)
    grad: Fact | None = attrs.field(eq=False, repr=False)
    bits_where_shared: tuple[torch.Tensor, ...] = attrs.field(default=(), eq=False, repr=False)
    attached: tuple[object, ...] = attrs.field(default=(), eq=False, repr=False)


Facts = Mapping[str, Fact]


def fact_of(tensor: torch.Tensor) -> Fact:
    """The record of a tensor and of its gradient."""
    plain = is_plain(tensor)
    return Fact(
        tensor,
        dtype=tensor.dtype,
        shape=tuple(tensor.shape),
        stride=tuple(tensor.stride()) if plain else (),
        offset=int(tensor.storage_offset()) if plain else 0,
        storage=storage_key(tensor) if plain else 0,
        requires_grad=tensor.requires_grad,
        bits=bits_of(tensor) if plain and not tensor.is_meta else None,
        grad=None if tensor.grad is None else fact_of(tensor.grad),
        attached=(
            *sorted(vars(tensor).items()),
            *(tensor._backward_hooks or {}).items(),
            *(tensor._post_accumulate_grad_hooks or {}).items(),
        ),
    )


def facts_of(model: nn.Module) -> Facts:
    """The record of every name of a model."""
    return {name: fact_of(tensor) for name, tensor in tensors_of(model)}


def wrong_elements(now: Fact, then: Fact) -> list[int]:
    """The places at which `now` has other bits than `then` allows."""
    if now.bits is None or then.bits is None:
        return [] if now.bits is then.bits else [0]
    found = now.bits.reshape(-1, now.dtype.itemsize)
    wrong = torch.ones(len(found), dtype=torch.bool, device=found.device)
    for bits in (then.bits, *then.bits_where_shared):
        wrong &= (bits.reshape(found.shape) != found).any(dim=1)
    return wrong.nonzero().flatten().tolist()


def values_differ(found: Facts, expected: Facts) -> Iterator[str]:
    """Every name whose value is another: dtype, shape, bits, trainability, gradient."""
    yield from _each(found, expected, _value_differs)


def objects_differ(found: Facts, expected: Facts) -> Iterator[str]:
    """Every name that stands for another tensor, or whose tensor has another gradient or hook."""
    yield from _each(found, expected, _object_differs)


def _object_differs(now: Fact, then: Fact) -> str:
    if now.tensor is not then.tensor:
        return "is another tensor object"
    if now.attached != then.attached:
        return "has other attributes or hooks"
    if now.grad is not None and then.grad is not None and now.grad.tensor is not then.grad.tensor:
        return "has another tensor object as its gradient"
    return ""


def all_differs(found: Facts, expected: Facts) -> Iterator[str]:
    """Every name that stands for another tensor, another piece of memory, or another value."""

    def differs(now: Fact, then: Fact) -> str:
        if text := _object_differs(now, then):
            return text
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
    if now.shape != then.shape:
        return f"has the shape {now.shape}, expected {then.shape}"
    if wrong := wrong_elements(now, then):
        return f"has other bits than expected: {_bits_at(wrong[0], now, then)}"
    if now.grad is None or then.grad is None:
        return "" if now.grad is then.grad else "lost or gained its gradient"
    text = _value_differs(now.grad, then.grad)
    return f"has a gradient that {text}" if text else ""


def _bits_at(place: int, now: Fact, then: Fact) -> str:
    size = now.dtype.itemsize
    found, expected = (
        bytes(reversed(fact.bits[place * size : (place + 1) * size].tolist())).hex()
        for fact in (now, then)
        if fact.bits is not None
    )
    return f"0x{found} at element {place}, expected 0x{expected}"


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
