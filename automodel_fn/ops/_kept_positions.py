"""Which positions of a sequence logits are made of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from automodel_fn.errors import ConfigError


def kept_positions(hidden_states: Tensor, logits_to_keep: Any) -> Tensor:
    """The hidden states of the positions that are kept; themselves where that is every one.

    Args:
        hidden_states: `[B, S, H]` or `[T, H]`.
        logits_to_keep: As for `lm_head_logits`.

    Raises:
        ConfigError: An argument is not as described.

    Example:
        >>> kept_positions(torch.ones(1, 5, 2), 3).shape
        torch.Size([1, 3, 2])
    """
    if hidden_states.dim() not in (2, 3) or not hidden_states.is_floating_point():
        raise ConfigError(
            f"hidden_states of shape {tuple(hidden_states.shape)} and dtype {hidden_states.dtype} "
            "must be [B, S, H] or [T, H], floating point."
        )
    length = hidden_states.shape[-2]
    if isinstance(logits_to_keep, Tensor):
        return _rows(hidden_states, _positions(logits_to_keep, length))
    is_count = isinstance(logits_to_keep, int | torch.SymInt)
    if not is_count or isinstance(logits_to_keep, bool) or not 0 <= logits_to_keep <= length:
        raise ConfigError(
            f"logits_to_keep={logits_to_keep!r} must be an int from 0 (all) to the {length} "
            "positions that there are, or a 1-D integer tensor of positions."
        )
    # A DTensor that is sharded over the sequence cannot be sliced from end to end (aten.alias).
    if logits_to_keep in (0, length):
        return hidden_states
    return _rows(hidden_states, slice(length - logits_to_keep, None))


def _rows(hidden_states: Tensor, rows: Any) -> Tensor:
    return hidden_states[rows] if hidden_states.dim() == 2 else hidden_states[:, rows]


def _positions(index: Tensor, length: int) -> Tensor:
    is_integer = not (index.is_floating_point() or index.is_complex() or index.dtype == torch.bool)
    if index.dim() != 1 or not is_integer:
        raise ConfigError(
            f"logits_to_keep of shape {tuple(index.shape)} and dtype {index.dtype} must be a "
            "1-D tensor of integers: positions, not a mask."
        )
    # uint8 would be taken for a mask.
    positions = index.long()
    has_values = type(index) is Tensor and index.device.type == "cpu" and index.numel()
    if has_values and not torch.compiler.is_compiling():
        least, most = int(positions.min()), int(positions.max())
        if least < 0 or most >= length:
            raise ConfigError(
                f"logits_to_keep names the positions {least} to {most}; "
                f"there are {length}, counted from 0."
            )
    return positions
