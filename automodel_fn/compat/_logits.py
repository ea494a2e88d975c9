"""The original's lm_head: its way of slicing, its rule for FSDP2, and its output class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from automodel_fn.ops._heads import compute_dtype_of
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

    logits = hidden_states
    if lm_head is not None:
        is_sharded = isinstance(lm_head, fsdp_module)
        kept = _kept(hidden_states, logits_to_keep)
        if fp32_lm_head:
            logits = _in_fp32(lm_head, kept, is_sharded)
        else:
            dtype = _dtype_of_sharded(lm_head) if is_sharded else compute_dtype_of(lm_head)
            logits = lm_head(kept if dtype is None else kept.to(dtype))
    made: Any = CausalLMOutputWithPast(logits=_with_batch(logits, is_thd))
    if output_hidden_states:
        made["hidden_states"] = _with_batch(hidden_states, is_thd)
    return made


def _in_fp32(lm_head: nn.Module, kept: torch.Tensor, is_sharded: bool) -> torch.Tensor:
    """FSDP2 casts the input to its compute dtype, also where float32 was asked for."""
    if is_sharded or kept.dim() not in (2, 3) or not kept.is_floating_point():
        return lm_head(kept.float()).to(kept.dtype)
    return lm_head_logits(lm_head, kept, precision="fp32", logits_dtype=kept.dtype).logits


def _dtype_of_sharded(lm_head: Any) -> torch.dtype | None:
    dtype = lm_head._get_fsdp_state()._mp_policy.param_dtype
    weight = getattr(lm_head, "weight", None)
    return weight.dtype if dtype is None and isinstance(weight, torch.Tensor) else dtype


def _kept(hidden_states: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """The positions that are kept, by the original's expression: -1 drops the first of them."""
    if isinstance(logits_to_keep, int) and logits_to_keep == 0:
        return hidden_states
    index = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    return hidden_states[index, :] if hidden_states.dim() == 2 else hidden_states[:, index, :]


def _with_batch(tensor: torch.Tensor, is_thd: bool) -> torch.Tensor:
    return tensor.unsqueeze(0) if is_thd and tensor.dim() == 2 else tensor
