"""The original's two module factories, with the backends that it knows, and its fp32 norm."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from automodel_fn.errors import BackendUnavailableError, ConfigError
from automodel_fn.nn._rms_norm import Float32RMSNorm
from automodel_fn.ops._rms_norm import rms_norm_fp32
from automodel_fn.te._load import load_te_classes

Device = torch.device | str | None


def float32_rms_norm_fwd(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """RMSNorm of `[*, hidden]` in fp32, in the dtype of x; not compiled."""
    return rms_norm_fp32(x, weight, eps)


def linear_module(
    backend: str,
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    device: Device,
    dtype: torch.dtype,
    patch: Callable[[], None],
) -> nn.Module:
    """A linear layer of `backend`; `patch` is called where it is Transformer Engine's."""
    if backend == "torch":
        return nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
    if backend == "te":
        made: Any = load_te_classes().linear
        patch()
        return made(
            in_features=in_features,
            out_features=out_features,
            bias=bias,
            device=device,
            params_dtype=dtype,
        )
    if backend == "quack":
        quack = _quack("linear", "quack.linear", "Linear")
        return quack(in_features, out_features, bias=bias, device=device, dtype=dtype)
    raise ConfigError(
        f"linear_impl={backend!r}: Unsupported Linear implementation: {backend}; "
        "expected torch, te or quack."
    )


def rms_norm_module(
    backend: str,
    dim: int,
    *,
    eps: float,
    device: Device,
    dtype: torch.dtype,
    patch: Callable[[], None],
) -> nn.Module:
    """An RMSNorm of `backend`; `patch` is called where it is Transformer Engine's."""
    if backend == "te":
        made: Any = load_te_classes().rms_norm
        patch()
        return made(normalized_shape=dim, eps=eps, device=device, params_dtype=dtype)
    if backend == "torch":
        return nn.RMSNorm(dim, eps=eps, device=device, dtype=dtype)
    if backend == "torch_fp32":
        return Float32RMSNorm(dim, eps=eps, device=device, dtype=dtype)
    if backend == "quack":
        return _quack("rms_norm", "quack.rmsnorm", "QuackRMSNorm")(
            dim, eps=eps, device=device, dtype=dtype
        )
    raise ConfigError(
        f"rms_norm_impl={backend!r}: Unsupported RMSNorm implementation: {backend}; "
        "expected torch, torch_fp32, te or quack."
    )


def _quack(field: str, module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise BackendUnavailableError(
            f"{field}='quack' requires the 'quack-kernels' package: {error}."
        ) from error
