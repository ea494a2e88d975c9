"""The way back from an apply that kept its originals."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import attrs
import torch

from automodel_fn.cast._bits import merged, same_bits
from automodel_fn.cast._conversions import Conversion, each_with_data, gradient_of
from automodel_fn.cast._exchange import Exchange, Originals, exchange
from automodel_fn.cast._plan import WeakObjects
from automodel_fn.cast._tensors import scan
from automodel_fn.errors import StalePlanError, itemized


@attrs.define
class Undo:
    """The way back from one apply; works once."""

    conversions: Sequence[Conversion]
    originals: Originals | None
    model_ref: WeakObjects

    def run(self) -> None:
        if self.originals is None:
            raise StalePlanError("this cast was undone already; there is nothing left to undo.")
        pairs = tuple(each_with_data(self.conversions, self.originals))
        present = {id(i.tensor) for model in self.model_ref.alive() for i in scan(model).tensors}
        changed = [
            conversion.names[0]
            for conversion, originals in pairs
            if conversion.is_weight and not _is_unchanged(conversion, originals, present)
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
        reverse = [_reverse(*pair) for pair in pairs]
        exchange([*reverse, *_new_gradients(self.conversions, present)], keep_originals=True)
        self.originals = None


def _is_unchanged(
    conversion: Conversion, originals: tuple[torch.Tensor, ...], present: Container[int]
) -> bool:
    """Whether the model still holds these tensors, with the bits that the cast gave them."""
    again = conversion.made_of(originals)
    return all(
        id(tensor) in present and same_bits(tensor, cast)
        for tensor, cast in zip(conversion.tensors, again, strict=True)
    )


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
            yield Conversion(
                (f"{name}.grad",),
                owners=(name,),
                tensors=(grad,),
                from_dtype=conversion.to_dtype,
                to_dtype=conversion.from_dtype,
                is_weight=False,
            ).exchange()


def _reverse(conversion: Conversion, originals: tuple[torch.Tensor, ...]) -> Exchange:
    def make() -> tuple[torch.Tensor, ...]:
        if conversion.is_weight:
            return originals
        (tensor,), (original,) = conversion.tensors, originals
        return (merged(original, tensor, conversion.from_dtype),)

    return Exchange(
        conversion.names,
        tensors=conversion.tensors,
        make=make,
        num_bytes=0,
        can_finish=False,
    )
