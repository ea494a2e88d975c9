"""The original's casts: which tensor gets which dtype, by its rules."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import nn

from automodel_fn.cast._dtensors import is_plain
from automodel_fn.cast._frozen import frozen_rule
from automodel_fn.cast._tensors import PARAMETER, ModelScan, NamedTensor, scan
from automodel_fn.compat._keywords import PRESERVED, has_keyword, lies_in, preserved_dtypes
from automodel_fn.compat._packages import LOGGER
from automodel_fn.compat._retype import retype


def cast_model(
    model: nn.Module,
    dtype: torch.dtype,
    skip_modules: Collection[str],
    keywords: Sequence[str],
    strict: Sequence[str],
    *,
    is_sharded: bool,
    ignores_preserved: bool,
) -> None:
    """Cast every floating-point tensor but pins, which are or become float32.

    In a sharded model only strict keywords pin parameters: others may share a group of FSDP2 with
    parameters of another dtype.

    Raises:
        TypeError: `dtype` is neither floating point nor complex.
    """
    asked: Any = dtype
    if isinstance(asked, torch.dtype) and not (asked.is_floating_point or asked.is_complex):
        raise TypeError(f"dtype={dtype} must be a floating-point or complex dtype.")
    model_scan = scan(model)
    preserved = {} if ignores_preserved else preserved_dtypes(model_scan)
    of_parameters = strict if is_sharded else keywords

    def rule(item: NamedTensor) -> torch.dtype | None:
        if has_keyword(item, of_parameters if item.kind == PARAMETER else keywords):
            return torch.float32
        if lies_in(item, skip_modules):
            return None
        return preserved.get(id(item.tensor), dtype)

    retype(model, rule)
    only_buffers = [keyword for keyword in keywords if keyword not in strict]
    if is_sharded and only_buffers:
        LOGGER.warning(
            "The model is sharded (its parameters are DTensors): of the keywords %s, which are not "
            "strict, only buffers are kept in float32.",
            only_buffers,
        )


def to_float32(model: nn.Module, keywords: Collection[str], *, buffers_only: bool) -> None:
    """Cast what a keyword names to float32, wherever it stands."""

    def rule(item: NamedTensor) -> torch.dtype | None:
        is_of_kind = item.kind != PARAMETER or not buffers_only
        return torch.float32 if is_of_kind and has_keyword(item, keywords) else None

    retype(model, rule)


def cast_frozen(model: nn.Module, dtype: torch.dtype, keywords: Sequence[str]) -> None:
    """Cast frozen parts, and whole modules that mix frozen weights with trainable adapters."""
    model_scan = scan(model)
    pinned = [i for i, item in enumerate(model_scan.tensors) if has_keyword(item, keywords)]
    pins = {id(model_scan.tensors[index].tensor) for index in pinned}
    is_frozen = frozen_rule(model_scan, "all", pinned, is_castable=_is_unsharded_float)

    def rule(item: NamedTensor) -> torch.dtype | None:
        is_cast = id(item.tensor) not in pins and _is_unsharded_float(item)
        return dtype if is_cast and is_frozen(item) is not None else None

    retype(model, rule)


def prepare_frozen(model: nn.Module, dtype: torch.dtype | None, keywords: Sequence[str]) -> None:
    """Store frozen float32 parameters in `dtype`, and have later casts preserve every dtype."""
    model_scan = scan(model)
    parameters = [item for item in model_scan.tensors if item.kind == PARAMETER]
    lowered = (
        {id(item.tensor) for item in parameters if _is_lowered(item, dtype, keywords)}
        if dtype in (torch.bfloat16, torch.float16)
        else set[int]()
    )
    retype(model, lambda item: dtype if id(item.tensor) in lowered else None)
    has_both = len({item.tensor.requires_grad for item in parameters}) > 1
    if lowered or has_both:
        _preserve(model_scan, trainable_only=not lowered)


def _is_lowered(item: NamedTensor, dtype: torch.dtype | None, keywords: Sequence[str]) -> bool:
    hint = getattr(item.tensor, "_hf_compute_dtype", None)
    return (
        not item.tensor.requires_grad
        and item.tensor.dtype in (torch.float32, dtype)
        and not has_keyword(item, keywords)
        and hint != torch.float32
    )


def _preserve(model_scan: ModelScan, *, trainable_only: bool) -> None:
    for _, _, module in model_scan.modules:
        dtypes = {
            name: parameter.dtype
            for name, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad or not trainable_only
        }
        if dtypes or not trainable_only:
            setattr(module, PRESERVED, dtypes)


def _is_unsharded_float(item: NamedTensor) -> bool:
    from torch.distributed.tensor import DTensor  # at the call: the original's callers replace it

    tensor = item.tensor
    return tensor.is_floating_point() and is_plain(tensor) and not isinstance(tensor, DTensor)
