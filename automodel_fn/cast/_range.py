"""What a cast to float16 takes out of range, counted while it is done.

Float16 ends at 65504 and has nothing between 0 and 6e-8, so that finite values become infinite and
small ones zero without an error. Bfloat16 has the range of float32 but for the last 0.2 % and the
smallest subnormals: casts to it are not counted, and cost nothing more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import torch

from automodel_fn.cast._conversions import Conversion
from automodel_fn.cast._dtensors import is_plain, local
from automodel_fn.cast._exchange import Exchange

_INTEGERS = {2: torch.int16, 4: torch.int32}
_INFINITY = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000}
# As much as stays in a core's cache, and as is worth a launch and a wait on a device.
_CHUNK_ON_CPU, _CHUNK_ON_DEVICE = 1 << 18, 1 << 22
_SCRATCH_BYTES = 8  # an element: the bits of both as integers, and a mask


@attrs.frozen
class RangeLoss:
    """How many values of one tensor a cast to float16 took out of range.

    Args:
        name: Canonical FQN of the tensor; or what belongs to it, as "weight.grad" and
            "weight (exp_avg_sq)".
        num_infinite: How many finite values became infinite; of a DTensor, in this rank's shard.
        num_zero: How many values other than zero became zero.

    Example:
        >>> from automodel_fn import apply, cast_plan, fp16
        >>> model = torch.nn.LayerNorm(3)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([1e6, 1.0, 1e-9]))
        >>> apply(cast_plan(model, fp16)).range_losses
        (RangeLoss(name='weight', num_infinite=1, num_zero=1),)
    """

    name: str
    num_infinite: int = attrs.field(kw_only=True)
    num_zero: int = attrs.field(kw_only=True)


class RangeCount:
    """Counts while conversions are carried out; a conversion that is repeated counts once."""

    def __init__(self, conversions: Sequence[Conversion]) -> None:
        self._conversions = conversions
        self._found: dict[int, RangeLoss | None] = {
            id(tensor): None
            for conversion in conversions
            if conversion.to_dtype == torch.float16
            for tensor in conversion.tensors
        }

    def exchanges(self) -> list[Exchange]:
        """The exchanges of the conversions; those to float16 also count.

        Counted is in the step that makes the new data: an error there is one of the conversion.
        """
        return [self._exchange(conversion) for conversion in self._conversions]

    def losses(self) -> tuple[RangeLoss, ...]:
        """What was found, in the order of the conversions; without tensors that lost nothing."""
        return tuple(loss for loss in self._found.values() if loss is not None)

    def _exchange(self, conversion: Conversion) -> Exchange:
        exchange = conversion.exchange()
        if conversion.to_dtype != torch.float16:
            return exchange

        def make(start: int, stop: int) -> tuple[torch.Tensor, ...]:
            data = exchange.make(start, stop)
            self._count(conversion, start, data)
            return data

        # What the counting takes is set aside too, so that a cast can be finished with it.
        most = max(min(tensor.numel(), _chunk(tensor)) for tensor in conversion.tensors)
        return attrs.evolve(
            exchange,
            make=make,
            num_bytes=exchange.num_bytes + most * _SCRATCH_BYTES,
        )

    def _count(self, conversion: Conversion, start: int, data: tuple[torch.Tensor, ...]) -> None:
        stop = start + len(data)
        names, tensors = conversion.names[start:stop], conversion.tensors[start:stop]
        parts = zip(names, tensors, data, strict=True)
        for name, before, after in parts:
            num_infinite, num_zero = range_loss(local(before).detach(), local(after))
            loss = RangeLoss(name, num_infinite=num_infinite, num_zero=num_zero)
            self._found[id(before)] = loss if num_infinite or num_zero else None


def range_loss(before: torch.Tensor, after: torch.Tensor) -> tuple[int, int]:
    """How many finite values became infinite, and how many others than zero became zero.

    Example:
        >>> values = torch.tensor([1e6, -1e-9, 0.0, float("inf"), float("nan")])
        >>> range_loss(values, values.half())
        (1, 1)
    """
    if after.is_meta or not is_plain(after):
        return 0, 0
    counts = [_counts(*pieces) for pieces in _pieces(before, after, _chunk(after))]
    return sum(infinite for infinite, _ in counts), sum(zero for _, zero in counts)


def range_note(losses: Sequence[RangeLoss]) -> tuple[str, ...]:
    """The losses in one sentence; none if there are none.

    Example:
        >>> range_note([RangeLoss("x.weight", num_infinite=3, num_zero=0)])
        ("a cast to float16 made 3 values of 1 tensors infinite, first in 'x.weight'",)
    """
    parts = [
        f"{sum(counts)} values of {len(counts)} tensors {what}"
        for what, counts in (
            ("infinite", [loss.num_infinite for loss in losses if loss.num_infinite]),
            ("zero", [loss.num_zero for loss in losses if loss.num_zero]),
        )
        if counts
    ]
    if not parts:
        return ()
    return (f"a cast to float16 made {' and '.join(parts)}, first in {losses[0].name!r}",)


def _chunk(tensor: torch.Tensor) -> int:
    return _CHUNK_ON_CPU if tensor.device.type == "cpu" else _CHUNK_ON_DEVICE


def _pieces(
    before: torch.Tensor, after: torch.Tensor, chunk: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The same parts of both, none larger than a chunk, without a copy whatever the strides."""
    if after.numel() <= chunk:
        if after.numel():
            yield before, after
        return
    sizes = [size if size > 1 else 0 for size in after.shape]
    dim = max(range(after.dim()), key=lambda i: (bool(sizes[i]), after.stride(i)))
    length = max(1, sizes[dim] * chunk // after.numel())
    for pair in zip(before.split(length, dim), after.split(length, dim), strict=True):
        yield from _pieces(*pair, chunk)


def _counts(before: torch.Tensor, after: torch.Tensor) -> tuple[int, int]:
    sizes = _magnitude_bits(after)
    least, most = torch.stack(sizes.aminmax()).tolist()
    num_infinite = num_zero = 0
    if most >= _INFINITY[after.dtype]:  # also of a NaN
        num_infinite = _num_infinite(after) - _num_infinite(before)
    if least == 0:
        num_zero = _num_nonzero(before) - _num_nonzero(after)
    return num_infinite, num_zero


def _num_infinite(tensor: torch.Tensor) -> int:
    return int(torch.count_nonzero(_magnitude_bits(tensor) == _INFINITY[tensor.dtype]))


def _num_nonzero(tensor: torch.Tensor) -> int:
    return int(torch.count_nonzero(_magnitude_bits(tensor)))


def _magnitude_bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bits without the sign, as integers; also where the CPU takes subnormals for zero."""
    width = 8 * tensor.dtype.itemsize
    return tensor.view(_INTEGERS[tensor.dtype.itemsize]) & ((1 << (width - 1)) - 1)
