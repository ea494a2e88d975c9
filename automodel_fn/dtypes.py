"""Names of dtypes, and which of them a cast may touch.

`parse_dtype` and `dtype_name` are inverse to each other. Sizes are in bytes.
"""

from __future__ import annotations

import torch

from automodel_fn.errors import ConfigError

bf16 = torch.bfloat16
fp16 = torch.float16
fp32 = torch.float32

CASTABLE: frozenset[torch.dtype] = frozenset({bf16, fp16, fp32})
"""The dtypes that are cast from and to. Integers, bools, complex, float64 and everything of less
than 16 bits are left alone: casting them loses more than precision."""

_SHORT_NAMES = {"bf16": bf16, "fp16": fp16, "fp32": fp32, "half": fp16, "float": fp32}


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype without its `torch.` prefix.

    Example:
        >>> dtype_name(torch.bfloat16)
        'bfloat16'
    """
    return str(dtype).removeprefix("torch.")


def parse_dtype(value: torch.dtype | str) -> torch.dtype:
    """The dtype that a name such as "bf16", "bfloat16" or "torch.bfloat16" stands for.

    Args:
        value: A `torch.dtype`, which is returned as it is, or a name.

    Raises:
        ConfigError: The name is not one of a dtype.

    Example:
        >>> parse_dtype("bf16"), parse_dtype(torch.int8)
        (torch.bfloat16, torch.int8)
    """
    if isinstance(value, torch.dtype):
        return value
    if isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
        name = value.removeprefix("torch.")
        found = _SHORT_NAMES.get(name, getattr(torch, name, None))
        if isinstance(found, torch.dtype):
            return found
    raise ConfigError(
        f"dtype={value!r} is not a dtype; "
        "use one of torch's, or a name such as 'bf16', 'fp16', 'fp32' or 'bfloat16'."
    )


def parse_castable(value: torch.dtype | str, name: str = "dtype") -> torch.dtype:
    """As `parse_dtype`, but only a dtype that tensors are cast to: bf16, fp16 or fp32.

    Raises:
        ConfigError: Not a dtype, or not one of the three.

    Example:
        >>> parse_castable("fp16")
        torch.float16
    """
    dtype = parse_dtype(value)
    if dtype not in CASTABLE:
        raise ConfigError(
            f"{name}={dtype_name(dtype)} is not a dtype that tensors are cast to; "
            "expected bf16, fp16 or fp32."
        )
    return dtype


def is_wider(dtype: torch.dtype, other: torch.dtype) -> bool:
    """Whether a value of `dtype` takes more bytes than one of `other`.

    Example:
        >>> is_wider(torch.float32, torch.bfloat16), is_wider(torch.float16, torch.bfloat16)
        (True, False)
    """
    return dtype.itemsize > other.itemsize
