"""How a class of RMSNorm computes: found by trying it, on a few values."""

from __future__ import annotations

import functools
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from automodel_fn.convert._overlay import is_close, probe_tensor
from automodel_fn.ops._rms_norm import WeightMultiply, rms_norm_fp32

EPS_NAMES = ("variance_epsilon", "eps", "norm_eps", "epsilon")
_WAYS: tuple[tuple[WeightMultiply, int], ...] = (("input", 0), ("fp32", 0), ("fp32", 1))
_SIZE = 32
_TRIED = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)


@attrs.frozen
class NormConvention:
    """What a family's RMSNorm does beside dividing by the root of the mean square.

    Args:
        eps_name: Under which attribute its epsilon is.
        weight_multiply: "input" rounds before it multiplies with the weight (Llama), "fp32"
            afterwards (GPT-OSS, Gemma).
        offset: Added to the weight: 1 for Gemma, whose weights are made of zeros.
    """

    eps_name: str
    weight_multiply: WeightMultiply = attrs.field(kw_only=True)
    offset: int = attrs.field(kw_only=True)

    def text(self) -> str:
        """The convention in words."""
        weight = "1 + weight" if self.offset else "weight"
        when = "after" if self.weight_multiply == "input" else "before"
        return f"multiplies with {weight} {when} rounding"


def normed(module: Any, x: Tensor, convention: NormConvention) -> Tensor:
    """The norm of `x` by one operation in float32, rounded as the family rounds.

    Args:
        module: Has the weight and the epsilon.
        x: `[..., H]`.
        convention: How the family does it.
    """
    weight, eps = module.weight, getattr(module, convention.eps_name)
    if convention.offset:
        return rms_norm_fp32(x, weight.float() + convention.offset, eps)
    if convention.weight_multiply == "fp32":
        return rms_norm_fp32(x, weight, eps)
    if weight.dtype == x.dtype:
        return rms_norm_fp32(x, weight, eps, weight_multiply="input")
    # The product of the rounded value has the wider dtype of the two.
    return weight * rms_norm_fp32(x, None, eps)


@functools.cache
def norm_convention(cls: type[nn.Module]) -> NormConvention | None:
    """How the forward of a class computes; None if it is no RMSNorm that is known here.

    It is run on the CPU for an object of that class that was not initialised and has a weight, an
    epsilon under each of the names that there are, and nothing else.

    Args:
        cls: A class of modules.
    """
    for eps_name in EPS_NAMES:
        for multiply, offset in _WAYS:
            convention = NormConvention(eps_name, weight_multiply=multiply, offset=offset)
            if all(_fits(cls, convention, *dtypes) for dtypes in _TRIED):
                return convention
    return None


def _fits(
    cls: type[nn.Module], convention: NormConvention, dtype: torch.dtype, weight_dtype: torch.dtype
) -> bool:
    # Small values, so that it shows which epsilon was added.
    x = 0.3 * probe_tensor(64, _SIZE)
    module: Any = object.__new__(cls)
    epsilons = {name: 0.5 if name == convention.eps_name else 8.0 for name in EPS_NAMES}
    weight = probe_tensor(_SIZE, dtype=weight_dtype, seed=1)
    vars(module).update(epsilons, weight=weight)
    try:
        with torch.no_grad(), torch.device("cpu"):
            found = cls.forward(module, x.to(dtype))
    # It is no such norm: it wants other attributes, other arguments or another shape.
    except (AttributeError, TypeError, RuntimeError, ValueError, LookupError):
        return False
    return is_close(found, _composed(module, x.to(dtype), convention))


def _composed(module: Any, x: Tensor, convention: NormConvention) -> Tensor:
    """The norm in torch's operators, in the order of the families' own code."""
    eps = getattr(module, convention.eps_name)
    wide = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    if convention.weight_multiply == "input":
        return module.weight * wide.to(x.dtype)
    return ((convention.offset + module.weight.float()) * wide).to(x.dtype)
