"""The dtype changes that a plan asks for: of weights, and of what belongs to them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import attrs
import torch
from torch.optim import Optimizer

from automodel_fn.cast._dtensors import is_distributed, local
from automodel_fn.cast._exchange import Exchange, converted
from automodel_fn.cast._plan import TensorCast
from automodel_fn.cast._rules import storage_groups
from automodel_fn.cast._tensors import ModelScan
from automodel_fn.dtypes import dtype_name, is_wider


@attrs.frozen
class Conversion:
    """A dtype change of one storage: weights, a gradient, or optimizer state.

    Args:
        name: What it is, for messages.
        owner: Canonical FQN of the weight that it is of or belongs to.
        tensors: The tensor, or all tensors that are views of the storage.
        from_dtype: Their dtype before.
        to_dtype: Their dtype afterwards.
        is_weight: Whether it is a parameter or buffer, not something that belongs to one.
    """

    name: str
    owner: str = attrs.field(kw_only=True)
    tensors: tuple[torch.Tensor, ...] = attrs.field(kw_only=True, eq=False, repr=False)
    from_dtype: torch.dtype = attrs.field(kw_only=True)
    to_dtype: torch.dtype = attrs.field(kw_only=True)
    is_weight: bool = attrs.field(kw_only=True)

    def exchange(self) -> Exchange:
        """The exchange that carries it out."""
        numel = sum(tensor.numel() for tensor in self.tensors)
        return Exchange(
            self.name,
            tensors=self.tensors,
            make=lambda: converted(self.tensors, self.to_dtype),
            num_bytes=numel * self.to_dtype.itemsize,
            can_finish=not is_wider(self.to_dtype, self.from_dtype)
            and not any(map(is_distributed, self.tensors)),
        )


def conversions_of(
    entries: Sequence[TensorCast], model_scan: ModelScan, optimizers: Sequence[Optimizer] = ()
) -> Iterator[Conversion]:
    """Every dtype change that the entries ask for: weights, then what belongs to each of them."""
    planned = {name: entry for entry in entries if entry.changes for name in entry.names}
    changing = [item for item in model_scan.tensors if item.names[0] in planned]
    grouped = {index: group for group in storage_groups(changing) for index in group}
    for index, item in enumerate(changing):
        entry = planned[item.names[0]]
        group = grouped.get(index, [index])
        if index == group[0]:
            tensors = tuple(changing[member].tensor for member in group)
            yield _conversion(entry.name, tensors, entry, is_weight=True)
        for name, tensor in _belongings(item.tensor, entry, optimizers):
            yield _conversion(name, (tensor,), entry, is_weight=False)


def _conversion(
    name: str, tensors: tuple[torch.Tensor, ...], entry: TensorCast, *, is_weight: bool
) -> Conversion:
    return Conversion(
        name,
        owner=entry.name,
        tensors=tensors,
        from_dtype=entry.from_dtype,
        to_dtype=entry.to_dtype,
        is_weight=is_weight,
    )


def _belongings(
    tensor: torch.Tensor, entry: TensorCast, optimizers: Sequence[Optimizer]
) -> Iterator[tuple[str, torch.Tensor]]:
    """A tensor's gradient, and its optimizer state of its own shape and dtype; no step counters."""
    if tensor.grad is not None and tensor.grad.dtype == entry.from_dtype:
        yield f"{entry.name}.grad", tensor.grad
    for optimizer in optimizers:
        for key, value in optimizer.state.get(tensor, {}).items():
            is_alike = isinstance(value, torch.Tensor) and value.shape == tensor.shape
            if is_alike and key != "step" and value.dtype == entry.from_dtype:
                yield f"{entry.name} ({key})", value


def dry_run(conversions: Sequence[Conversion]) -> None:
    """Cast one element of each kind, so that what cannot be cast fails before anything changes."""
    kinds = {
        (type(t), c.from_dtype, c.to_dtype, t.device): t for c in conversions for t in c.tensors
    }
    for (kind, from_dtype, to_dtype, _), tensor in kinds.items():
        try:
            local(tensor).detach().new_empty(1).to(to_dtype)
        except Exception as error:
            error.add_note(
                f"while trying one element of {kind.__name__}, {dtype_name(from_dtype)} to "
                f"{dtype_name(to_dtype)}; the model was not changed."
            )
            raise
