"""The way back from an apply that kept its originals."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import attrs
import torch

from automodel_fn.cast._bits import merged, same_bits
from automodel_fn.cast._conversions import Conversion, each_with_data, gradient_of
from automodel_fn.cast._exchange import Exchange, Originals, exchange
from automodel_fn.cast._sharded import Shards, together
from automodel_fn.cast._tensors import ModelScan, scan
from automodel_fn.errors import StalePlanError, itemized
from automodel_fn.plans import WeakObjects


@attrs.define
class Undo:
    """The way back from one apply; works once."""

    conversions: Sequence[Conversion]
    originals: Originals | None
    model_ref: WeakObjects

    def run(self) -> None:
        if self.originals is None:
            raise StalePlanError("this cast was undone already; there is nothing left to undo.")
        alive = self.model_ref.alive()
        model_scan = scan(alive[0]) if alive else ModelScan((), modules=())
        with together(model_scan) as shards:
            self._run(self.originals, model_scan, shards)
        self.originals = None

    def _run(self, kept: Originals, model_scan: ModelScan, shards: Shards) -> None:
        present = {id(item.tensor) for item in model_scan.tensors}
        changed = [
            name
            for conversion, originals in zip(self.conversions, kept, strict=True)
            if conversion.is_weight
            for name in _changed(conversion, originals, present)
        ]
        if changed:
            raise StalePlanError(
                itemized(
                    f"the weights changed since the cast: {len(changed)} tensors differ from what "
                    "it left",
                    changed,
                    "Nothing was changed. Bring the dtypes back with apply(plan.inverse()).",
                )
            )
        reverse = [_reverse(*pair) for pair in each_with_data(self.conversions, kept)]
        new_gradients = _new_gradients(self.conversions, present)
        exchange([*reverse, *new_gradients], shards, keep_originals=True)


def _changed(
    conversion: Conversion, originals: tuple[torch.Tensor, ...], present: Container[int]
) -> Iterator[str]:
    """What is not in the model any more, or has other bits than the cast gave it."""
    for start, stop in conversion.steps():
        again = conversion.made_of(originals[start:stop])
        places = range(start, stop)
        for place, cast in zip(places, again, strict=True):
            tensor = conversion.tensors[place]
            if id(tensor) not in present or not same_bits(tensor, cast):
                yield conversion.names[place]


def _new_gradients(
    conversions: Sequence[Conversion], present: Container[int]
) -> Iterator[Exchange]:
    """Gradients that came after the cast: they go back with their weights."""
    known = {id(tensor) for conversion in conversions for tensor in conversion.tensors}
    for conversion in conversions:
        pairs = zip(conversion.names, conversion.tensors, strict=True)
        for name, tensor in pairs if conversion.is_weight else ():
            grad = gradient_of(tensor)
            if grad is None or grad.dtype != conversion.to_dtype:
                continue
            if id(grad) in known or id(grad) in present:
                continue
            known.add(id(grad))
            yield Conversion.of_one_storage(
                (f"{name}.grad",), (grad,), conversion.from_dtype, owners=(name,)
            ).exchange()


def _reverse(conversion: Conversion, originals: tuple[torch.Tensor, ...]) -> Exchange:
    def make() -> tuple[torch.Tensor, ...]:
        if conversion.is_weight:
            return originals
        (tensor,), (original,) = conversion.tensors, originals
        return (merged(original, tensor, conversion.from_dtype),)

    return Exchange.at_once(conversion.names, conversion.tensors, make)
