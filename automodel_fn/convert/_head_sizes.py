"""Sizes and dtypes of attention, and which kernels there are for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from automodel_fn.convert._around import Around
from automodel_fn.convert._parts import Part

_NAMES = ("head_dim", "qk_head_dim", "v_head_dim")
_TE_MULTIPLE, _TE_MOST, _FLEX_LEAST = 8, 256, 16


def head_sizes(module: nn.Module) -> dict[str, int]:
    """How many values the heads of an attention module have, by what it says itself.

    Example:
        >>> module = nn.Module()
        >>> module.head_dim = 64
        >>> head_sizes(module)
        {'head_dim': 64}
    """
    found = {name: getattr(module, name, None) for name in _NAMES}
    # Of multi-head latent attention head_dim is no size of what is multiplied.
    if found["qk_head_dim"] is not None:
        del found["head_dim"]
    return {name: size for name, size in found.items() if isinstance(size, int)}


def unfit_for_te(module: nn.Module) -> str:
    """Why Transformer Engine has no fast attention for a module, or ""."""
    for name, size in head_sizes(module).items():
        if size % _TE_MULTIPLE or size > _TE_MOST:
            return (
                f"{name}={size} is none that Transformer Engine has a fast kernel for: a multiple "
                f"of {_TE_MULTIPLE}, {_TE_MOST} at most"
            )
    return "its weights are stored in float64" if stored_dtype(module) == torch.float64 else ""


def unfit_for_flex(module: nn.Module) -> str:
    """Why FlexAttention has no kernel on a GPU for a module, or ""."""
    for name, size in head_sizes(module).items():
        if size < _FLEX_LEAST:
            return f"{name}={size} is less than the {_FLEX_LEAST} that FlexAttention takes on a GPU"
    return ""


def stored_dtype(module: nn.Module) -> torch.dtype | None:
    """The dtype of the first weight of a module and of what is in it; None if there is none."""
    first: Any = next(module.parameters(), None)
    return None if first is None else first.dtype


def has_wide_te_attention(part: Part, around: Around) -> bool:
    """Whether attention is to be Transformer Engine's, and its weights are stored in float32."""
    return around.asked["te_attn"] == "True" and stored_dtype(part.module) == torch.float32
