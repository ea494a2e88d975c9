"""The dtype changes that a plan asks for: of weights, and of what belongs to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, cast

import attrs
import torch
from torch.distributed.tensor import DTensor

from automodel_fn.cast._convert import bytes_of_views, converted, converted_views
from automodel_fn.cast._dtensors import local
from automodel_fn.cast._exchange import Exchange
from automodel_fn.dtypes import dtype_name, is_wider

_TORCHS_FUNCTIONS: tuple[Any, ...] = (
    cast(Any, torch.Tensor).__torch_function__.__func__,
    cast(Any, torch.nn.Parameter).__torch_function__,
)
_ORDINARY = {torch.Tensor, torch.nn.Parameter}
_ALWAYS_CAST = {"cpu", "cuda", "meta"}


@attrs.frozen
class Conversion:
    """A dtype change of tensors, step by step: of weights, or of gradients and optimizer state.

    Args:
        names: For each tensor what it is, for messages.
        owners: For each the canonical FQN of the weight that it is, or belongs to.
        tensors: The tensors, on one device.
        from_dtype: Their dtype before.
        to_dtype: Their dtype afterwards.
        ends: Where each step ends; those between two ends are converted together.
        num_bytes: What converting the largest takes; or all of them, if they are one storage.
        is_weight: Whether they are parameters or buffers, not what belongs to one.
        is_one_storage: Whether they are views of one storage, and stay so.
    """

    names: tuple[str, ...]
    owners: tuple[str, ...] = attrs.field(kw_only=True)
    tensors: tuple[torch.Tensor, ...] = attrs.field(kw_only=True, eq=False, repr=False)
    from_dtype: torch.dtype = attrs.field(kw_only=True)
    to_dtype: torch.dtype = attrs.field(kw_only=True)
    ends: tuple[int, ...] = attrs.field(kw_only=True)
    num_bytes: int = attrs.field(kw_only=True)
    is_weight: bool = attrs.field(kw_only=True)
    is_one_storage: bool = attrs.field(default=False, kw_only=True)

    @classmethod
    def of_one_storage(
        cls,
        names: tuple[str, ...],
        tensors: tuple[torch.Tensor, ...],
        to_dtype: torch.dtype,
        owners: tuple[str, ...] | None = None,
    ) -> Conversion:
        """That of one tensor, or of several that are views of one storage.

        Args:
            names: What they are.
            tensors: The tensors.
            to_dtype: Their dtype afterwards.
            owners: The weights that they belong to; None if they are weights themselves.
        """
        alone, are_views = num_values(tensors[0]) * to_dtype.itemsize, len(tensors) > 1
        return cls(
            names,
            owners=owners or names,
            tensors=tensors,
            from_dtype=tensors[0].dtype,
            to_dtype=to_dtype,
            ends=(len(tensors),),
            num_bytes=bytes_of_views(tensors, to_dtype) if are_views else alone,
            is_weight=owners is None,
            is_one_storage=are_views,
        )

    def made(self, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        """The tensors of these places in their new dtype."""
        return self.made_of(self.tensors[start:stop])

    def made_of(self, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """What the conversion makes of tensors like its own."""
        convert = converted_views if self.is_one_storage else converted
        return convert(tensors, self.to_dtype)

    def steps(self) -> Iterator[tuple[int, int]]:
        """Where each step begins and ends."""
        return pairwise((0, *self.ends))

    def parts(self) -> tuple[Conversion, ...]:
        """The same, one storage at a time."""
        if self.is_one_storage:
            return (self,)
        return tuple(
            attrs.evolve(self, names=(name,), owners=(owner,), tensors=(tensor,), ends=(1,))
            for name, owner, tensor in zip(self.names, self.owners, self.tensors, strict=True)
        )

    def _first_bytes(self) -> int:
        if self.is_one_storage:
            return self.num_bytes
        return sum(map(num_values, self.tensors[: self.ends[0]])) * self.to_dtype.itemsize

    def exchange(self) -> Exchange:
        """The exchange that carries it out."""
        return Exchange(
            self.names,
            tensors=self.tensors,
            make=self.made,
            ends=self.ends,
            num_bytes=self.num_bytes,
            first_bytes=self._first_bytes(),
            can_finish=not is_wider(self.to_dtype, self.from_dtype)
            and all(map(_is_bound_to_finish, set(map(type, self.tensors)))),
            is_divisible=not self.is_one_storage,
        )


def each_with_data(
    conversions: Sequence[Conversion], data: Sequence[tuple[torch.Tensor, ...]]
) -> Iterator[tuple[Conversion, tuple[torch.Tensor, ...]]]:
    """Conversions of one storage each, with the data that a run of them all gave for it."""
    for conversion, tensors in zip(conversions, data, strict=True):
        if conversion.is_one_storage:
            yield conversion, tensors
        else:
            yield from zip(conversion.parts(), ((tensor,) for tensor in tensors), strict=True)


def _is_bound_to_finish(kind: type[torch.Tensor]) -> bool:
    """Whether no subclass has a word in its conversion, and could refuse it again and again."""
    function: Any = kind.__torch_function__
    is_torchs = getattr(function, "__func__", function) in _TORCHS_FUNCTIONS
    return is_torchs and not issubclass(kind, DTensor)


def num_values(tensor: torch.Tensor) -> int:
    """How many values a tensor holds in memory; fewer than elements if it is sparse."""
    return tensor._values().numel() if tensor.layout is torch.sparse_coo else tensor.numel()


def gradient_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """The gradient that a tensor holds; one that an operation made may hold none, and warns."""
    return tensor.grad if tensor.is_leaf or tensor.retains_grad else None


def dry_run(conversions: Sequence[Conversion]) -> None:
    """Cast one element of each kind, so that what cannot be cast fails before anything changes.

    Ordinary tensors on devices that come with PyTorch can be: these are not tried.
    """
    kinds: dict[tuple[Any, ...], torch.Tensor] = {}
    for c in conversions:
        device = c.tensors[0].device
        if device.type in _ALWAYS_CAST and _ORDINARY.issuperset(map(type, c.tensors)):
            continue
        for kind, tensor in {type(tensor): tensor for tensor in c.tensors}.items():
            kinds[kind, c.from_dtype, c.to_dtype, device] = tensor
    for (kind, from_dtype, to_dtype, _), tensor in kinds.items():
        try:
            local(tensor).detach().new_empty(1).to(to_dtype)
        except Exception as error:
            error.add_note(
                f"while trying one element of {kind.__name__}, {dtype_name(from_dtype)} to "
                f"{dtype_name(to_dtype)}; the model was not changed."
            )
            raise
