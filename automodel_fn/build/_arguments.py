"""Checks of what the builders are given, and the device in the words of Transformer Engine."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import torch

from automodel_fn.dtypes import parse_dtype
from automodel_fn.errors import ConfigError, itemized


def check_arguments(
    what: str,
    backend: object,
    choices: tuple[str, ...],
    sizes: dict[str, object],
    dtype: torch.dtype | str,
    others: Iterable[str] = (),
) -> torch.dtype:
    """The dtype of the parameters, if all arguments are as they must be.

    Args:
        what: What is to be built, for the message.
        backend: The backend that was asked for.
        choices: Those that there are.
        sizes: The sizes by their names.
        dtype: A dtype or its name.
        others: What else is wrong, a line each.

    Raises:
        ConfigError: They are not; all that is wrong is listed.
    """
    lines: list[str] = []
    if backend not in choices:
        lines.append(_unknown_backend(str(backend), choices))
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            lines.append(f"{name}={size!r} must be a positive int, a number of features")
    lines += others
    parsed = _parsed(dtype, lines)
    if lines:
        raise ConfigError(itemized(f"{what} cannot be built:", lines))
    return parsed


def device_name(device: torch.device | str | None) -> str:
    """The device as a string, which Transformer Engine compares; PyTorch's default for None."""
    return str(torch.get_default_device() if device is None else torch.device(device))


def _unknown_backend(backend: str, choices: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(backend, choices, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f"backend={backend!r} must be one of {', '.join(map(repr, choices))}{hint}"


def _parsed(dtype: torch.dtype | str, lines: list[str]) -> torch.dtype:
    """The dtype; what is wrong with it is added to the lines."""
    try:
        parsed = parse_dtype(dtype)
    except ConfigError as error:
        lines.append(str(error))
        return torch.float32
    if not parsed.is_floating_point:
        lines.append(f"dtype={dtype} must be a floating-point dtype, that of the parameters")
    return parsed
