"""How a class of RMSNorm computes: found by trying it, on a few values."""

from __future__ import annotations

import functools
import inspect
from typing import Any, Literal

import attrs
import torch
from torch import Tensor, nn

from automodel_fn.convert._overlay import is_close, probe_tensor
from automodel_fn.ops._rms_norm import rms_norm_fp32

EPS_NAMES = ("variance_epsilon", "eps", "norm_eps", "epsilon")
NARROW_DTYPES = (torch.bfloat16, torch.float16)
Multiply = Literal["input", "weight", "fp32", "none"]
_WAYS: tuple[tuple[Multiply, int], ...] = (
    ("input", 0),
    ("weight", 0),
    ("fp32", 0),
    ("fp32", 1),
    ("none", 0),
)
_SIZE = 32
TRIED = (
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
)
"""Of the input and of the weight."""


@attrs.frozen
class NormConvention:
    """What a family's RMSNorm does beside dividing by the root of the mean square.

    Args:
        eps_name: Under which attribute its epsilon is.
        multiply: "input" rounds to the dtype of the input before it multiplies with the weight
            (Llama), "weight" to that of the weight if that is narrow (T5), "fp32" afterwards
            (GPT-OSS, Gemma); "none" has no weight (NanoChat, Gemma 4 without a scale).
        offset: Added to the weight: 1 for Gemma, whose weights are made of zeros.
    """

    eps_name: str
    multiply: Multiply = attrs.field(kw_only=True)
    offset: int = attrs.field(kw_only=True)


def normed(module: Any, x: Tensor, convention: NormConvention) -> Tensor:
    """The norm of `x` by one operation in float32, rounded as the family rounds.

    Args:
        module: Has the epsilon, and the weight if there is one.
        x: `[..., H]`.
        convention: How the family does it.
    """
    eps = getattr(module, convention.eps_name)
    if convention.multiply == "none":
        return rms_norm_fp32(x, None, eps)
    weight = module.weight
    if convention.offset:
        return rms_norm_fp32(x, weight.float() + convention.offset, eps)
    if convention.multiply == "fp32":
        return rms_norm_fp32(x, weight, eps)
    if weight.dtype == x.dtype:
        return rms_norm_fp32(x, weight, eps, weight_multiply="input")
    # The product of the rounded value has the wider dtype of the two.
    if convention.multiply == "input":
        return weight * rms_norm_fp32(x, None, eps)
    wide = rms_norm_fp32(x.float(), None, eps)
    return weight * (wide.to(weight.dtype) if weight.dtype in NARROW_DTYPES else wide)


def has_weight(module: Any) -> bool:
    """Whether a norm has a weight: of one class some may have one, and others not."""
    return getattr(module, "weight", None) is not None


@functools.cache
def norm_convention(cls: type[nn.Module], is_weighted: bool = True) -> NormConvention | None:
    """How the forward of a class computes; None if it is no RMSNorm that is known here.

    It is run on the CPU for an object of that class that was not initialised and has a weight, an
    epsilon under each of the names that there are, and what says that there are no groups.

    Args:
        cls: A class of modules.
        is_weighted: Whether the module has a weight.
    """
    if cls.forward is nn.RMSNorm.forward:
        # Known, and not tried: with two dtypes it warns.
        return NormConvention("eps", multiply="fp32" if is_weighted else "none", offset=0)
    # A gate that may be left out, say: without it the forward is that of a plain norm.
    if len(inspect.signature(cls.forward).parameters) != 2:
        return None
    for eps_name in EPS_NAMES:
        for multiply, offset in _WAYS:
            convention = NormConvention(eps_name, multiply=multiply, offset=offset)
            if all(_fits(cls, convention, is_weighted, *dtypes) for dtypes in TRIED):
                return convention
    return None


def _fits(
    cls: type[nn.Module],
    convention: NormConvention,
    is_weighted: bool,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
) -> bool:
    module = untrained(cls, convention.eps_name, weight_dtype)
    vars(module).update(with_scale=is_weighted, group_size=None)
    if not is_weighted:
        module.weight = None
    x = norm_input(dtype)
    found = tried(cls, module, x)
    if not is_weighted and convention.multiply != "none":
        return False
    return is_close(found, _composed(module, x, convention))


def untrained(cls: type[nn.Module], eps_name: str, weight_dtype: torch.dtype) -> Any:
    """An object of a class with a weight `[32]` and epsilons, of which one is another one."""
    module: Any = object.__new__(cls)
    epsilons = {name: 0.5 if name == eps_name else 8.0 for name in EPS_NAMES}
    vars(module).update(epsilons, weight=probe_tensor(_SIZE, dtype=weight_dtype, seed=1))
    return module


def norm_input(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Values `[64, 32]`, small, so that it shows which epsilon was added."""
    return (0.3 * probe_tensor(64, _SIZE, seed=seed)).to(dtype)


def tried(cls: type[nn.Module], module: Any, *given: Any) -> Any:
    """What the forward of a class gives, run on the CPU; None where it wants something else."""
    try:
        with torch.no_grad(), torch.device("cpu"):
            return cls.forward(module, *given)
    # It wants other attributes, other arguments or another shape.
    except (AttributeError, TypeError, RuntimeError, ValueError, LookupError):
        return None


def _composed(module: Any, x: Tensor, convention: NormConvention) -> Tensor:
    """The norm in torch's operators, in the order of the families' own code."""
    wide = divided(x.float(), getattr(module, convention.eps_name))
    weight: Any = module.weight
    if convention.multiply == "none":
        return wide.to(x.dtype)
    if convention.multiply == "input":
        return weight * wide.to(x.dtype)
    if convention.multiply == "weight":
        return weight * (wide.to(weight.dtype) if weight.dtype in NARROW_DTYPES else wide)
    return ((convention.offset + weight.float()) * wide).to(x.dtype)


def divided(x: Tensor, eps: float) -> Tensor:
    """`x` over the root of its mean square."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
