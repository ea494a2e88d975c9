"""The backend that options ask for: a file, and single fields over it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import attrs

from automodel_fn.backend._config import BackendConfig
from automodel_fn.errors import ConfigError

FIELDS = (
    "attn",
    "linear",
    "rms_norm",
    "rope_fusion",
    "swiglu",
    "loss",
    "lm_head_precision",
    "experts",
    "te_fp8",
)
"""Those that have an option, in the order in which the commands give them."""

_WORDS = {"true": True, "false": False}


def asked_backend(file: Path | None, fields: Sequence[str | None]) -> BackendConfig | None:
    """The backend of a file, with the fields that were given; None if nothing was asked for.

    Args:
        file: YAML, or JSON where its name ends so; without it the default.
        fields: The values of FIELDS, None for those that were not given.

    Raises:
        ConfigError: The file cannot be read, or something in it or in the fields is wrong.
    """
    named = zip(FIELDS, fields, strict=True)
    given = {name: _value(value) for name, value in named if value is not None}
    if file is None:
        return BackendConfig.from_dict(given) if given else None
    return attrs.evolve(_read(file), **given)


def _value(text: str) -> str | bool:
    return _WORDS.get(text.lower(), text)


def _read(file: Path) -> BackendConfig:
    try:
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"backend={str(file)!r} cannot be read: {error}.") from None
    read = BackendConfig.from_json if file.suffix == ".json" else BackendConfig.from_yaml
    try:
        return read(text)
    except ConfigError as error:
        raise ConfigError(f"backend={str(file)!r}: {error}") from None
