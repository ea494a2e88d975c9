"""Stacked weights of experts multiplied by Transformer Engine's GroupedLinear.

A GroupedLinear has a parameter for each expert. Here it has none: it sees views of a stacked one,
for the time of a forward, and is beside the module that has that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from automodel_fn.ops._experts import Stacked
from automodel_fn.ops._routing import Routing
from automodel_fn.te._aware import step_aware
from automodel_fn.te._cache import RecipeReader
from automodel_fn.te._load import load_te_classes, recipe_reader

_DEFAULT_MULTIPLE = 16


class GroupedLinears:
    """A `Product` by Transformer Engine: one GroupedLinear for each layer of one module's experts.

    They are made when they are first needed; a copy or a pickle has none. The weights that they
    quantize are kept and made anew as those of other modules that see the step: what is watched is
    the stacked parameter.

    Raises:
        BackendUnavailableError: Transformer Engine cannot be imported here.
    """

    def __init__(self) -> None:
        self._made: dict[str, tuple[Any, Any]] = {}
        self._read_recipe: RecipeReader | None = None

    def __reduce__(self) -> tuple[type[GroupedLinears], tuple[()]]:
        return GroupedLinears, ()

    def multiple(self) -> int | None:
        """FP8 needs a multiple of 16 rows or more; without it any number will do."""
        if self._read_recipe is None:
            load_te_classes()
            self._read_recipe = recipe_reader()
        recipe = self._read_recipe()
        return 1 if recipe is None else row_multiple(recipe)

    def modules(self) -> Iterable[Any]:
        """Those that were made so far."""
        return [made for _, made in self._made.values()]

    def __call__(self, x: Tensor, layer: Stacked, routing: Routing) -> Tensor:
        """As `Product`."""
        made = self._module_for(layer)
        weight = layer.weight.mT.contiguous() if layer.is_transposed else layer.weight
        names = {f"weight{index}": each for index, each in enumerate(_split(weight))}
        if layer.bias is not None:
            names |= {f"bias{index}": each for index, each in enumerate(_split(layer.bias))}
        # What is watched for changes, and compared with the dtype of the input.
        vars(made)["_parameters"][layer.name] = layer.weight
        vars(made).update(names)
        try:
            return made(x, list(routing.splits or ()))
        finally:
            # They would keep the graph of this forward.
            for name in names:
                del vars(made)[name]

    def _module_for(self, layer: Stacked) -> Any:
        kind = layer.weight.shape, layer.weight.dtype, layer.bias is None, layer.is_transposed
        if self._made.get(layer.name, ())[:1] != (kind,):
            # Of another dtype, after a cast, it would keep what it quantized before.
            weight = layer.weight.mT if layer.is_transposed else layer.weight
            _, size_out, size_in = weight.shape
            made = step_aware(load_te_classes().grouped_linear, "grouped_linear")(
                num_gemms=len(layer.weight),
                in_features=size_in,
                out_features=size_out,
                bias=layer.bias is not None,
                device="meta",
                params_dtype=layer.weight.dtype,
            )
            vars(made)["_parameters"].clear()
            self._made[layer.name] = kind, made
        return self._made[layer.name][1]


def row_multiple(recipe: object) -> int:
    """Of how many rows a recipe needs a multiple in each expert.

    Source:
        `get_align_size_for_quantization` (Transformer Engine 2.20).

    Example:
        >>> row_multiple("unknown")
        16
    """
    known: Any = recipe
    of_format = {"mxfp8": 32, "nvfp4": 128}
    for name, multiple in of_format.items():
        if getattr(recipe, name, bool)():
            return multiple
    is_custom = getattr(recipe, "custom", bool)()
    return int(getattr(known, "quantization_alignment", 128)) if is_custom else _DEFAULT_MULTIPLE


def _split(stacked: Tensor) -> tuple[Tensor, ...]:
    apply: Any = _Split.apply
    return apply(stacked)


class _Split(torch.autograd.Function):
    """The tensors of a stack; their gradients are a stack without a copy where they lie as one."""

    @staticmethod
    def forward(ctx: Any, stacked: Tensor) -> tuple[Tensor, ...]:
        return stacked.detach().unbind(0)

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *parts: Tensor
    ) -> Tensor:
        return torch.stack(parts) if torch.is_grad_enabled() else joined(parts)


def joined(parts: tuple[Tensor, ...]) -> Tensor:
    """Tensors as one stack, without a copy where they lie one after the other in one storage.

    As the gradients do that GroupedLinear gives.

    Example:
        >>> whole = torch.arange(6.0).view(3, 2)
        >>> joined(whole.unbind(0)).data_ptr() == whole.data_ptr()
        True
        >>> joined((torch.zeros(2), torch.ones(2)))
        tensor([[0., 0.],
                [1., 1.]])
    """
    first, size = parts[0], parts[0].numel()
    if not all(_follows(each, first, index) for index, each in enumerate(parts)):
        return torch.stack(parts)
    return first.as_strided((len(parts), *first.shape), (size, *first.stride()))


def _follows(part: Tensor, first: Tensor, index: int) -> bool:
    return (
        part.is_contiguous()
        and part.dtype == first.dtype
        and part.storage_offset() == first.storage_offset() + index * first.numel()
        and part.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
    )
