"""The backend that options ask for: a file, and single fields over it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import attrs

from automodel_fn.backend._config import BackendConfig
from automodel_fn.backend._text import cannot_be_made, names_of, no_field
from automodel_fn.errors import ConfigError

FIELDS = (
    "attn",
    "linear",
    "rms_norm",
    "rope_fusion",
    "async_masks",
    "swiglu",
    "loss",
    "lm_head_precision",
    "experts",
    "te_fp8",
)
"""Those that have an option, in the order in which the commands give them."""

_WORDS = {"true": True, "false": False, "none": None}


def asked_backend(
    file: Path | None, fields: Sequence[str | None], assignments: Sequence[str] = ()
) -> BackendConfig | None:
    """The backend of a file, with the fields that were given; None if nothing was asked for.

    Args:
        file: YAML, or JSON where its name ends so; without it the default.
        fields: The values of FIELDS, None for those that were not given.
        assignments: Any fields, each as "field=value"; over the others.

    Raises:
        ConfigError: The file cannot be read, or something in it or in the fields is wrong.
        BackendUnavailableError: To read files, cattrs or PyYAML is missing; fields need neither.
    """
    named = zip(FIELDS, fields, strict=True)
    given = {name: _value(value) for name, value in named if value is not None}
    given |= dict(map(_assigned, assignments))
    names = names_of(BackendConfig)
    unknown = [no_field(name, names) for name in given if name not in names]
    if unknown:
        raise cannot_be_made(BackendConfig, given, unknown)
    if file is not None:
        return attrs.evolve(_read(file), **given)
    return BackendConfig(**given) if given else None


def _assigned(text: str) -> tuple[str, Any]:
    name, sign, value = text.partition("=")
    if not sign or not name:
        raise ConfigError(f"--set {text!r} must be field=value, as compile_attn=true.")
    return name.strip(), _value(value.strip())


def _value(text: str) -> Any:
    """A word, a truth value, a number or nothing, as it would be in YAML."""
    if text.lower() in _WORDS:
        return _WORDS[text.lower()]
    for read in (int, float):
        try:
            return read(text)
        except ValueError:
            continue
    return text


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
