"""NeMo Automodel's `nemo_automodel.components.models.common.utils`, name by name.

    from automodel_fn.compat import nemo as utils

Same signatures, defaults, results and warnings as in nemo-automodel 0.7.0, over the areas of this
library; where it differs, and why, is in the documentation ("Moving from NeMo Automodel"). Names
that start with an underscore are here because that documentation lists them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from automodel_fn.compat import (
    _backend,
    _flags,
    _fp8,
    _fp32_tensors,
    _keywords,
    _modules,
    _moe_configs,
    _packages,
)
from automodel_fn.compat._casting import cast_frozen, cast_model, prepare_frozen
from automodel_fn.compat._logits import causal_lm_output
from automodel_fn.compat._rope import rope_parts
from automodel_fn.nn import _rms_norm
from automodel_fn.te import _unallocated
from automodel_fn.te._patch import patch_te

HAVE_DEEP_EP = _packages.HAVE_DEEP_EP
HAVE_GMM = _packages.HAVE_GMM
HAVE_TE = _packages.HAVE_TE
HAVE_UCCL_EP = _packages.HAVE_UCCL_EP
logger = _packages.LOGGER

# Not set here: the module reads and writes the step of the calling thread instead.
IS_FIRST_MICROBATCH: bool | None
IS_OPTIM_STEP: bool

AttentionBackend = _backend.AttentionBackend
CudaGraphConfig = _moe_configs.CudaGraphConfig
Float32RMSNorm = _rms_norm.Float32RMSNorm
MoKBackendConfig = _moe_configs.MoKBackendConfig
get_is_first_microbatch = _flags.get_is_first_microbatch
get_is_optim_step = _flags.get_is_optim_step
is_tensor_unallocated = _unallocated.is_tensor_unallocated
set_is_first_microbatch = _flags.set_is_first_microbatch
set_is_optim_step = _flags.set_is_optim_step
_float32_rms_norm_fwd = _modules.float32_rms_norm_fwd
_get_fp32_module_keywords = _keywords.fp32_keywords
_get_strict_fp32_module_keywords = _keywords.strict_fp32_keywords
_restore_fp32_buffers = _fp32_tensors.restore_fp32_buffers
_restore_fp32_modules = _fp32_tensors.restore_fp32_modules
_restore_fp32_tensor_snapshots = _fp32_tensors.restore_fp32_tensor_snapshots
_snapshot_fp32_tensors = _fp32_tensors.snapshot_fp32_tensors


class TEFp8Config(_fp8.TEFp8Settings):
    """FP8 by Transformer Engine; nothing, silently, where HAVE_TE is false."""

    def build_recipe(self) -> Any:
        """Transformer Engine's recipe, or None."""
        return self.recipe_where(HAVE_TE)

    def maybe_te_autocast(self) -> AbstractContextManager[Any]:
        """Transformer Engine's autocast, or a context that does nothing."""
        return self.autocast_where(HAVE_TE)


class BackendConfig(_backend.BackendSettings):
    """Backends of a model's parts; mutable, with the original's fallbacks and warnings."""

    _fp8_config = TEFp8Config


def initialize_rms_norm_module(
    rms_norm_impl: str,
    dim: int,
    eps: float = 1e-5,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """An RMSNorm by "torch", "torch_fp32", "te" or "quack"."""
    return _modules.rms_norm_module(
        rms_norm_impl, dim, eps=eps, device=device, dtype=dtype, patch=_patch_te_modules
    )


def initialize_linear_module(
    linear_impl: str,
    in_features: int,
    out_features: int,
    bias: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> nn.Module:
    """A linear layer by "torch", "te" or "quack"."""
    return _modules.linear_module(
        linear_impl,
        in_features,
        out_features,
        bias=bias,
        device=device,
        dtype=dtype,
        patch=_patch_te_modules,
    )


def _make_lazy_te_patcher() -> Callable[[], None]:
    """A function that patches Transformer Engine at its first call, for good."""
    handles: list[Any] = []

    def patch() -> None:
        if not handles:
            handles.append(patch_te())

    return patch


_patch_te_modules = _make_lazy_te_patcher()


def get_rope_config(config: Any) -> tuple[float, dict[str, Any], float]:
    """(rope_theta, rope_parameters, partial_rotary_factor) of a model's config."""
    return rope_parts(config)


def cast_model_to_dtype(
    model: nn.Module,
    dtype: torch.dtype = torch.bfloat16,
    skip_modules: tuple[str, ...] = (),
    *,
    ignore_preserved_dtypes: bool = False,
) -> None:
    """Cast a model, but for its declared fp32 pins and the submodules named in `skip_modules`."""
    cast_model(
        model,
        dtype,
        skip_modules or (),
        _get_fp32_module_keywords(model),
        _get_strict_fp32_module_keywords(model),
        is_sharded=_has_dtensor_params(model),
        ignores_preserved=ignore_preserved_dtypes,
    )


@contextmanager
def yield_fp32_model(
    model: nn.Module, restore_dtype: torch.dtype | None = None
) -> Generator[nn.Module]:
    """Inside the model is fp32, afterwards `restore_dtype`: its first parameter's if None."""
    if restore_dtype is None:
        dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
        restore_dtype = next(dtypes, torch.float32)
    cast_model_to_dtype(model, torch.float32, ignore_preserved_dtypes=True)
    try:
        yield model
    finally:
        cast_model_to_dtype(model, restore_dtype)


def _has_dtensor_params(model: nn.Module) -> bool:
    """Whether any parameter is a DTensor."""
    from torch.distributed.tensor import DTensor

    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def compute_lm_head_logits(
    lm_head: nn.Module | None,
    hidden_states: torch.Tensor,
    logits_to_keep: int | torch.Tensor = 0,
    is_thd: bool = False,
    fp32_lm_head: bool = False,
    output_hidden_states: bool = False,
) -> Any:
    """Logits, and hidden states if asked for, as a `CausalLMOutputWithPast` of transformers."""
    return causal_lm_output(
        lm_head,
        hidden_states,
        logits_to_keep,
        is_thd=is_thd,
        fp32_lm_head=fp32_lm_head,
        output_hidden_states=output_hidden_states,
        fsdp_module=FSDPModule,
    )


def prepare_frozen_parameters_for_sharding(
    model: nn.Module, compute_dtype: torch.dtype | None
) -> None:
    """Store frozen parameters in `compute_dtype`; later casts preserve every parameter's dtype."""
    prepare_frozen(model, compute_dtype, _get_fp32_module_keywords(model))


def cast_frozen_modules_to_compute_dtype(
    model: nn.Module, compute_dtype: torch.dtype | None
) -> None:
    """Cast frozen parts, and modules that mix frozen weights with adapters; None does nothing."""
    if compute_dtype is not None:
        cast_frozen(model, compute_dtype, _get_fp32_module_keywords(model))


sys.modules[__name__].__class__ = _flags.FlagModule

__all__ = [
    "AttentionBackend",
    "BackendConfig",
    "Float32RMSNorm",
    "TEFp8Config",
    "cast_frozen_modules_to_compute_dtype",
    "cast_model_to_dtype",
    "compute_lm_head_logits",
    "get_is_first_microbatch",
    "get_is_optim_step",
    "get_rope_config",
    "initialize_linear_module",
    "initialize_rms_norm_module",
    "prepare_frozen_parameters_for_sharding",
    "set_is_first_microbatch",
    "set_is_optim_step",
]
