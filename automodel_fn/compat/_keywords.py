"""What a model declares for the original: fp32 keywords, and dtypes that a cast must preserve."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from torch import nn

from automodel_fn.cast._tensors import ModelScan, NamedTensor

_STRICT, _PLAIN = "_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"
PRESERVED = "_preserve_parameter_dtypes"
"""Attribute of a module: the dtypes of its own parameters that `cast_model_to_dtype` preserves."""


def fp32_keywords(model: nn.Module) -> list[str]:
    """The fp32 keywords of the root's own attributes, strict ones first, each once."""
    return _keywords(model, _STRICT, _PLAIN)


def strict_fp32_keywords(model: nn.Module) -> list[str]:
    """The strict fp32 keywords of the root's own attribute, each once."""
    return _keywords(model, _STRICT)


def _keywords(model: nn.Module, *attributes: str) -> list[str]:
    values: list[Any] = [getattr(model, attribute, None) for attribute in attributes]
    # As in the original anything else, a single string too, declares nothing.
    listed = (value for value in values if isinstance(value, list | set | tuple))
    return list(dict.fromkeys(keyword for value in listed for keyword in value))


def has_keyword(item: NamedTensor, keywords: Collection[str]) -> bool:
    """Whether a keyword is part of any name of a tensor, with its wrappers or without."""
    names = {*item.names, *item.raw_names}
    return any(keyword in name for keyword in keywords for name in names)


def lies_in(item: NamedTensor, child_names: Collection[str]) -> bool:
    """Whether any path to a tensor goes through a submodule of one of these names."""
    return any(
        segment in child_names for name in item.raw_names for segment in name.split(".")[:-1]
    )


def preserved_dtypes(model_scan: ModelScan) -> dict[int, torch.dtype]:
    """The dtype of each parameter, by identity, that its module says must be preserved."""
    return {
        id(parameter): dtype
        for _, _, module in model_scan.modules
        for name, dtype in getattr(module, PRESERVED, {}).items()
        if (parameter := module._parameters.get(name)) is not None
    }


def first_matching_names(
    named: Iterable[tuple[str, torch.Tensor]], keywords: Collection[str]
) -> dict[str, torch.Tensor]:
    """Each floating-point tensor under the first of its names that a keyword is part of."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in named:
        if tensor.is_floating_point() and any(keyword in name for keyword in keywords):
            found.setdefault(id(tensor), (name, tensor))
    return dict(found.values())
