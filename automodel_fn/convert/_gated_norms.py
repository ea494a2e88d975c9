"""RMSNorms that a gate multiplies, as those of Mamba 2 and of gated delta nets."""

from __future__ import annotations

import functools
from itertools import product
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from automodel_fn.convert._norm_conventions import (
    EPS_NAMES,
    TRIED,
    divided,
    norm_input,
    tried,
    untrained,
)
from automodel_fn.convert._overlay import is_close
from automodel_fn.ops._rms_norm import rms_norm_fp32
from automodel_fn.ops._swiglu import swiglu

Groups = Literal["", "group_size", "n_groups"]
_ACTIVATIONS = {"silu": silu, "swish": silu, "sigmoid": torch.sigmoid}


@attrs.frozen
class GatedConvention:
    """Where a family's gated RMSNorm multiplies with the activated gate and with the weight.

    Args:
        eps_name: Under which attribute its epsilon is.
        multiply: "input" rounds before it multiplies with the weight (Mamba 2, Qwen3-Next), "fp32"
            afterwards (Kimi Linear, Falcon H1).
        is_gate_first: Whether what is normed was gated (Mamba 2), or what was normed is.
        groups: By which attribute each group is normed on its own, its size or their number; "" for
            none.
    """

    eps_name: str
    multiply: Literal["input", "fp32"] = attrs.field(kw_only=True)
    is_gate_first: bool = attrs.field(kw_only=True)
    groups: Groups = attrs.field(kw_only=True)


def gated(module: Any, x: Tensor, gate: Tensor | None, convention: GatedConvention) -> Tensor:
    """The gated norm, computed in float32 and rounded where the family rounds.

    Args:
        module: Has the weight `[H]`, the epsilon, and what says how large groups are.
        x: `[..., H]`.
        gate: `[..., H]`, or None for no gate.
        convention: How the family does it.
    """
    weight, eps = module.weight, getattr(module, convention.eps_name)
    is_one_product = _is_gated_last(convention) and _activation(module) is silu
    if gate is not None and is_one_product and x.dtype == weight.dtype == gate.dtype:
        return swiglu(gate, rms_norm_fp32(x, weight, eps, weight_multiply="input"))

    def norm(wide: Tensor) -> Tensor:
        return rms_norm_fp32(wide.contiguous(), None, eps)

    return _gated(module, x, gate, convention, norm)


def _is_gated_last(convention: GatedConvention) -> bool:
    """Whether the gate multiplies what was normed as a whole and rounded."""
    is_last = not convention.is_gate_first and not convention.groups
    return is_last and convention.multiply == "input"


def _gated(
    module: Any, x: Tensor, gate: Tensor | None, convention: GatedConvention, norm: Any
) -> Tensor:
    """The families' own order, around a norm without a weight."""
    wide, factor = x.float(), None if gate is None else _activation(module)(gate.float())
    if factor is not None and convention.is_gate_first:
        wide, factor = wide * factor, None
    size = _group_size(module, x, convention)
    wide = norm(wide.unflatten(-1, (-1, size))).flatten(-2) if size else norm(wide)
    if convention.multiply == "input":
        found = module.weight * wide.to(x.dtype)
        if convention.is_gate_first:
            return found
    else:
        found = module.weight.float() * wide
    return (found if factor is None else found * factor).to(x.dtype)


def _group_size(module: Any, x: Tensor, convention: GatedConvention) -> int:
    if not convention.groups:
        return 0
    size: int = getattr(module, convention.groups)
    return size if convention.groups == "group_size" else x.shape[-1] // size


def is_norm_first(module: Any) -> bool:
    """What a gated norm says of the order, where that is an attribute of it."""
    return bool(getattr(module, "norm_before_gate", True))


def _activation(module: Any) -> Any:
    return _ACTIVATIONS[getattr(module, "activation", "silu")]


def other_activation(module: Any) -> str:
    """The activation of a gate that is none of those known here, or ""."""
    name = getattr(module, "activation", "silu")
    return "" if name in _ACTIVATIONS else str(name)


@functools.cache
def gated_convention(cls: type[nn.Module], norm_first: bool = True) -> GatedConvention | None:
    """How the forward of a class computes; None if it is no gated RMSNorm that is known here.

    It is run on the CPU as that of other norms, with what gated ones have.

    Args:
        cls: A class of modules.
        norm_first: What the module says of the order, if it says it.
    """
    multiplies: tuple[Literal["input", "fp32"], ...] = ("input", "fp32")
    groupings: tuple[Groups, ...] = ("", "group_size", "n_groups")
    for eps_name, multiply, is_gate_first, groups in product(
        EPS_NAMES, multiplies, (False, True), groupings
    ):
        convention = GatedConvention(
            eps_name, multiply=multiply, is_gate_first=is_gate_first, groups=groups
        )
        if all(_fits(cls, convention, norm_first, *dtypes) for dtypes in TRIED):
            return convention
    return None


def _fits(
    cls: type[nn.Module],
    convention: GatedConvention,
    norm_first: bool,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> bool:
    module = untrained(cls, convention.eps_name, weight_dtype)
    x, gate = norm_input(dtype), 4 * norm_input(dtype, seed=2)
    given = {"norm_before_gate": norm_first, "activation": "silu", "n_groups": 2, "group_size": 8}
    vars(module).update(given)
    found = tried(cls, module, x, gate)
    if found is None:
        return False
    eps = getattr(module, convention.eps_name)
    with torch.no_grad():
        expected = _gated(module, x, gate, convention, lambda wide: divided(wide, eps))
    return is_close(found, expected)
