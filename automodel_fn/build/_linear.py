"""A linear layer by backend."""

from __future__ import annotations

import torch
from torch import nn

from automodel_fn.build._arguments import check_arguments, device_name
from automodel_fn.te._aware import step_aware
from automodel_fn.te._load import load_te_classes


def linear(
    in_features: int,
    out_features: int,
    *,
    bias: bool = False,
    backend: str = "torch",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
) -> nn.Module:
    """A linear layer: input `[*, in_features]`, output `[*, out_features]`, weight `[out, in]`.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Whether to add a bias `[out_features]`.
        backend: "torch" (`torch.nn.Linear`), or "te" (Transformer Engine's `Linear`, which sees
            the step context without `patch_te`, and infers shapes without memory).
        device: Where the parameters are made; PyTorch's default device if None. On "meta" they
            have no memory: give them some with `to_empty`, then call `reset_parameters()`.
        dtype: The dtype of the parameters.

    Returns:
        A module with `weight`, `reset_parameters()` and, if asked for, `bias`. What it is filled
        with at first is the backend's own choice: uniform values, or normal ones for "te".

    Raises:
        ConfigError: An unknown backend, a size that is not a positive int, not a dtype that
            parameters can have; all that is wrong is listed.
        BackendUnavailableError: Transformer Engine cannot be imported here.

    Source:
        `initialize_linear_module` (NeMo Automodel).

    Example:
        >>> linear(4, 2, device="meta")
        Linear(in_features=4, out_features=2, bias=False)
    """
    sizes: dict[str, object] = {"in_features": in_features, "out_features": out_features}
    stored = check_arguments("a linear layer", backend, ("torch", "te"), sizes, dtype)
    if backend == "torch":
        return nn.Linear(in_features, out_features, bias=bias, device=device, dtype=stored)
    made = step_aware(load_te_classes().linear, "linear")
    return made(
        in_features=in_features,
        out_features=out_features,
        bias=bias,
        device=device_name(device),
        params_dtype=stored,
    )
