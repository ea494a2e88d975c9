"""What each field of a backend may be: one function a kind, which says what is wrong or nothing."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import torch

from automodel_fn.backend._fp8 import TEFp8Config
from automodel_fn.backend._rules import AUTO, CHOICES, HEAD_PRECISIONS
from automodel_fn.dtypes import dtype_name, parse_dtype
from automodel_fn.errors import ConfigError

_GATES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_BOOLS = (
    "dispatcher_share_token_dispatcher",
    "dispatcher_async_dispatch",
    "fake_balanced_gate",
    "enable_hf_state_dict_adapter",
    "enable_fsdp_optimizations",
    "compile_attn",
)


def complaint(name: str, value: Any) -> str:
    """What is wrong with a field's value, or ""; without the value itself."""
    if name in CHOICES:
        return _no_choice(value, CHOICES[name])
    if name in _BOOLS:
        return "" if isinstance(value, bool) else "must be True or False"
    return {
        "rope_fusion": _no_switch,
        "async_masks": _no_switch,
        "dispatcher_num_sms": _no_count,
        "enable_deepep": _no_deepep,
        "fake_gate_noise": _no_noise,
        "te_fp8": _no_fp8,
        "lm_head_precision": _no_head_precision,
        "gate_precision": _no_precision,
    }[name](value)


def _no_choice(value: Any, allowed: tuple[str, ...]) -> str:
    if isinstance(value, str) and value in allowed:
        return ""
    near = get_close_matches(value.lower(), allowed, n=1) if isinstance(value, str) else []
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"must be one of {', '.join(map(repr, allowed))}{hint}"


def _no_switch(value: Any) -> str:
    fits = isinstance(value, bool) or (isinstance(value, str) and value == AUTO)
    return "" if fits else "must be True, False or 'auto'"


def _no_count(value: Any) -> str:
    fits = isinstance(value, int) and not isinstance(value, bool) and value > 0
    return "" if fits else "must be a whole number of at least 1"


def _no_deepep(value: Any) -> str:
    if value is None:
        return ""
    instead = {
        True: "say dispatcher='deepep' and experts='torch_mm' (or 'gmm')",
        False: "say dispatcher='torch'",
    }
    what = instead[value] if isinstance(value, bool) else "say which dispatcher and which experts"
    return f"is no longer a choice; leave it out and {what}"


def _no_noise(value: Any) -> str:
    fits = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
    return "" if fits else "must be a number from 0 to 1"


def _no_fp8(value: Any) -> str:
    if value is None or isinstance(value, TEFp8Config):
        return ""
    try:
        made_fp8(value)
    except (ConfigError, TypeError) as error:
        return f"is no FP8 config: {str(error).removeprefix('TEFp8Config.__init__() ')}"
    return ""


def _no_head_precision(value: Any) -> str:
    if value is None:
        return ""
    text = _no_choice(value, HEAD_PRECISIONS)
    return text.replace("one of", "None or one of", 1)


def _no_precision(value: Any) -> str:
    if value is None or (isinstance(value, torch.dtype) and value in _GATES):
        return ""
    return f"must be None or one of {', '.join(map(dtype_name, _GATES))}"


def made_fp8(value: Any) -> TEFp8Config:
    """A TEFp8Config from the name of a recipe or from a mapping of its fields.

    Raises:
        ConfigError: It is neither, or the recipe is none.
        TypeError: The mapping has a field that there is not.
    """
    if isinstance(value, str):
        return TEFp8Config(value)
    if isinstance(value, Mapping):
        return TEFp8Config(**value)  # pyright: ignore[reportUnknownArgumentType, reportCallIssue]
    raise ConfigError("expected a TEFp8Config, the name of a recipe, a mapping, or None")


def to_fp8(value: Any) -> Any:
    """Converter of te_fp8; it leaves what it cannot convert, to be complained of with the rest."""
    if value is None or isinstance(value, TEFp8Config):
        return value
    try:
        return made_fp8(value)
    except (ConfigError, TypeError):
        return value


def to_dtype(value: Any) -> Any:
    """Converter of gate_precision; it leaves what is no name of a dtype."""
    try:
        return parse_dtype(value)
    except ConfigError:
        return value


def to_float(value: Any) -> Any:
    """Converter of fake_gate_noise: 0 and 1 become floats."""
    is_whole = isinstance(value, int) and not isinstance(value, bool)
    return float(value) if is_whole and 0 <= value <= 1 else value
