"""An RMSNorm by backend."""

from __future__ import annotations

import torch
from torch import nn

from automodel_fn.build._arguments import check_arguments, device_name
from automodel_fn.nn._rms_norm import Float32RMSNorm
from automodel_fn.ops._rms_norm import complaints_about_options
from automodel_fn.te._aware import step_aware
from automodel_fn.te._load import load_te_classes


def rms_norm(
    dim: int,
    *,
    eps: float = 1e-5,
    backend: str = "torch_fp32",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
) -> nn.Module:
    """An RMSNorm over the last dimension: input and output `[*, dim]`, weight `[dim]`.

    Args:
        dim: Size of the last dimension.
        eps: Added to the mean square; at least 0.
        backend: "torch_fp32" (`Float32RMSNorm`: computed in fp32, rounded once), "torch"
            (`torch.nn.RMSNorm`), or "te" (Transformer Engine's `RMSNorm`, which also infers
            shapes without memory).
        device: Where the weight is made; PyTorch's default device if None. On "meta" it has no
            memory: give it some with `to_empty`, then call `reset_parameters()`.
        dtype: The dtype of the weight.

    Returns:
        A module with `weight` and `reset_parameters()`.

    Raises:
        ConfigError: An unknown backend, a dim that is not a positive int, an eps that is not
            finite and at least 0, not a dtype that a weight can have; all that is wrong is
            listed.
        BackendUnavailableError: Transformer Engine cannot be imported here.

    Source:
        `initialize_rms_norm_module` (NeMo Automodel).

    Example:
        >>> rms_norm(4, backend="torch", dtype="fp32")(torch.ones(1, 4)).shape
        torch.Size([1, 4])
    """
    choices, wrong = ("torch_fp32", "torch", "te"), complaints_about_options(eps, "fp32")
    stored = check_arguments("an RMSNorm", backend, choices, {"dim": dim}, dtype, wrong)
    if backend == "torch_fp32":
        return Float32RMSNorm(dim, eps=eps, device=device, dtype=stored)
    if backend == "torch":
        return nn.RMSNorm(dim, eps=eps, device=device, dtype=stored)
    made = step_aware(load_te_classes().rms_norm, "rms_norm")
    return made(normalized_shape=dim, eps=eps, device=device_name(device), dtype=stored)
