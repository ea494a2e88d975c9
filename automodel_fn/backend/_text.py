"""Backends as plain data and as text: what is read says where it is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from typing import Any

import torch

from automodel_fn.backend._fp8 import TEFp8Config
from automodel_fn.dtypes import dtype_name
from automodel_fn.errors import BackendUnavailableError, ConfigError, itemized


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config's fields as strings, numbers, booleans and None.

    Raises:
        ConfigError: FP8 by a recipe object, which has no name.
    """
    return {name: _plain(name, value) for name, value in values.items()}


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if not isinstance(value, TEFp8Config):
        return value
    if isinstance(value.recipe, str):
        return value.recipe
    raise ConfigError(
        f"{name}={type(value.recipe).__name__} is a recipe object, which has no name to write; "
        "use TEFp8Config with the name of a recipe."
    )


def checked_fields(data: object, known: Iterable[str]) -> dict[str, Any]:
    """The fields of a config, of which each has to be known.

    Raises:
        ConfigError: It is no mapping, or has keys that no field has; all of them are listed.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"backend={data!r} must be a mapping of fields, as {{'attn': 'sdpa'}}.")
    fields: Mapping[Any, Any] = data
    names = list(known)
    wrong = [f"{key!r} is no field{_near(key, names)}" for key in fields if key not in names]
    if wrong:
        raise ConfigError(
            itemized("this BackendConfig cannot be made", wrong, f"Fields: {', '.join(names)}.")
        )
    return dict(fields)


def _near(key: object, names: Iterable[str]) -> str:
    near = get_close_matches(str(key).replace("-", "_").lower(), list(names), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def from_json(text: str) -> Any:
    """The data of a JSON text.

    Raises:
        ConfigError: It is none.
    """
    try:
        return json.loads(text)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the text is no JSON: {error}.") from None


def from_yaml(text: str) -> Any:
    """The data of a YAML text; that of an empty one has no fields.

    Raises:
        ConfigError: It is none.
        BackendUnavailableError: PyYAML is not installed.
    """
    yaml = _yaml()
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"the text is no YAML: {' '.join(str(error).split())}.") from None
    return {} if found is None else found


def to_yaml(data: Mapping[str, Any]) -> str:
    """Data as YAML text, in its own order.

    Raises:
        BackendUnavailableError: PyYAML is not installed.
    """
    return _yaml().safe_dump(dict(data), sort_keys=False)


def _yaml() -> Any:
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            "YAML needs PyYAML, which is not installed; run pip install 'automodel_fn[config]', "
            "or write JSON."
        ) from error
    return yaml
