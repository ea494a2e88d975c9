"""Models to cast, and the check of what became of them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import attrs
import torch
from torch import nn

from automodel_fn.bench._spec import Case

_BLOCKS = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj", "out_proj"),
}
_PINNED_BLOCK = "mlp"
_TENSORS_PER_LAYER = sum(map(len, _BLOCKS.values()))


@attrs.frozen
class Outcome:
    """What became of a model that was to be cast to bf16.

    Args:
        is_cast_exact: Whether all but the fp32 pins are bf16, with the bits of `tensor.to`.
        are_pins_exact: Whether the fp32 pins are float32 with the bits from before; None if there
            are none.
        num_pins: How many there are.
    """

    is_cast_exact: bool
    are_pins_exact: bool | None = attrs.field(kw_only=True)
    num_pins: int = attrs.field(kw_only=True)


def built_model(case: Case) -> nn.Module:
    """A model of `num_tensors` weights of [rows, cols], float32, each in a storage of its own.

    It is a stack of layers with the names and the depth of a transformer's: a list of layers, two
    blocks a layer, four nn.Linear a block. With `half_pinned`, one of the two blocks is declared
    in `_keep_in_fp32_modules`. Every weight is filled, so that its pages are resident.
    """
    model = _Stack(case)
    for index, (_, linear) in enumerate(_linears(model)):
        linear.weight = nn.Parameter(_filled(case, index))
    return model


def outcome_of(model: nn.Module, case: Case) -> Outcome:
    """Compare every weight with what it was, which is made again: no copy is kept meanwhile."""
    cast: list[bool] = []
    pinned: list[bool] = []
    for index, (name, linear) in enumerate(_linears(model)):
        original = _filled(case, index)
        if case.parameter("half_pinned") and _PINNED_BLOCK in name:
            pinned.append(_same_bits(linear.weight, original))
        else:
            cast.append(_same_bits(linear.weight, original.to(torch.bfloat16)))
    return Outcome(all(cast), are_pins_exact=all(pinned) if pinned else None, num_pins=len(pinned))


class _Stack(nn.Module):
    _keep_in_fp32_modules: list[str] | None

    def __init__(self, case: Case) -> None:
        super().__init__()
        num_layers = case.parameter("num_tensors") // _TENSORS_PER_LAYER
        self.layers = nn.ModuleList(_layer(case) for _ in range(num_layers))
        self._keep_in_fp32_modules = [_PINNED_BLOCK] if case.parameter("half_pinned") else None


def _layer(case: Case) -> nn.ModuleDict:
    rows, cols = case.parameter("rows"), case.parameter("cols")
    return nn.ModuleDict(
        {
            block: nn.ModuleDict(
                {name: nn.Linear(cols, rows, bias=False, device="meta") for name in names}
            )
            for block, names in _BLOCKS.items()
        }
    )


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def _filled(case: Case, index: int) -> torch.Tensor:
    """The weight of that index: the same whenever it is made, and no two alike."""
    weight = torch.empty(case.parameter("rows"), case.parameter("cols"), device=case.device)
    return weight.uniform_(-1, 1, generator=_generator(case.device).manual_seed(index))


@cache
def _generator(device: str) -> torch.Generator:
    """One for all weights: on a GPU a new one takes longer than the weight."""
    return torch.Generator(device)


def _same_bits(found: torch.Tensor, expected: torch.Tensor) -> bool:
    if found.dtype != expected.dtype:
        return False
    integer = torch.int32 if expected.dtype.itemsize == 4 else torch.int16
    return torch.equal(found.detach().view(integer), expected.view(integer))
