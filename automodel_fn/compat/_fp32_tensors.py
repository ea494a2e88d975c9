"""The original's parts that copy, bring back and cast up single tensors by keyword."""

from __future__ import annotations

import torch
from torch import nn

from automodel_fn.compat._casting import to_float32
from automodel_fn.compat._keywords import first_matching_names
from automodel_fn.compat._retype import replace_data


def snapshot_fp32_tensors(
    model: nn.Module, *, parameter_keywords: list[str], buffer_keywords: list[str]
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Float32 copies, by name, of the parameters and of the buffers that a keyword names."""
    parameters = first_matching_names(
        model.named_parameters(remove_duplicate=False), parameter_keywords
    )
    buffers = {
        name: buffer
        for name, buffer in model.named_buffers(remove_duplicate=False)
        if buffer.is_floating_point() and any(keyword in name for keyword in buffer_keywords)
    }
    copied = ({k: v.detach().float().clone() for k, v in d.items()} for d in (parameters, buffers))
    return next(copied), next(copied)


def restore_fp32_tensor_snapshots(
    model: nn.Module,
    *,
    parameter_snapshots: dict[str, torch.Tensor],
    buffer_snapshots: dict[str, torch.Tensor],
) -> None:
    """Bring copies back, as float32; names that the model does not have are ignored."""
    replace_data(model, {**buffer_snapshots, **parameter_snapshots})


def restore_fp32_modules(model: nn.Module, fp32_keywords: list[str]) -> None:
    """Cast every parameter and buffer that a keyword names to float32."""
    to_float32(model, fp32_keywords, buffers_only=False)


def restore_fp32_buffers(model: nn.Module, fp32_keywords: list[str]) -> None:
    """Cast every buffer that a keyword names to float32."""
    to_float32(model, fp32_keywords, buffers_only=True)
