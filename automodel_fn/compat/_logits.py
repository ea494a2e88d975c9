"""The original's lm_head: its way of slicing, its rule for FSDP2, and its output class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from automodel_fn.ops._logits import lm_head_logits


def causal_lm_output(
    lm_head: nn.Module | None,
    hidden_states: torch.Tensor,
    logits_to_keep: int | torch.Tensor,
    *,
    is_thd: bool,
    fp32_lm_head: bool,
    output_hidden_states: bool,
    fsdp_module: type,
) -> Any:
    """A `CausalLMOutputWithPast` with logits, and with hidden states if they are asked for.

    What is a head of FSDP2 is told by `fsdp_module`, the class of its modules.
    """
    from transformers.modeling_outputs import CausalLMOutputWithPast

    kept = hidden_states if lm_head is None else _kept(hidden_states, logits_to_keep)
    if isinstance(lm_head, fsdp_module):
        logits = _sharded_logits(lm_head, kept, fp32_lm_head=fp32_lm_head)
    else:
        precision = "fp32" if fp32_lm_head and lm_head is not None else None
        dtype = None if precision is None else hidden_states.dtype
        logits = lm_head_logits(lm_head, kept, precision=precision, logits_dtype=dtype).logits
    made: Any = CausalLMOutputWithPast(logits=_with_batch(logits, is_thd))
    if output_hidden_states:
        made["hidden_states"] = _with_batch(hidden_states, is_thd)
    return made


def _sharded_logits(lm_head: Any, kept: torch.Tensor, *, fp32_lm_head: bool) -> torch.Tensor:
    """FSDP2 casts the input to its compute dtype, also where float32 was asked for."""
    if fp32_lm_head:
        return lm_head(kept.float()).to(kept.dtype)
    dtype = lm_head._get_fsdp_state()._mp_policy.param_dtype
    if dtype is None:
        dtype = lm_head.weight.dtype
    return lm_head(kept.to(dtype))


def _kept(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions that are kept, by the original's expression: -1 drops the first of them."""
    if isinstance(logits_to_keep, int) and logits_to_keep == 0:
        return hidden_states
    index = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return hidden_states[index, :] if hidden_states.dim() == 2 else hidden_states[:, index, :]


def _with_batch(tensor: torch.Tensor, is_thd: bool) -> torch.Tensor:
    return tensor.unsqueeze(0) if is_thd and tensor.dim() == 2 else tensor
