"""Backends as plain data and as text: what is read says where it is wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, TypeVar

import attrs
import torch

from automodel_fn.backend._fp8 import TEFp8Config
from automodel_fn.dtypes import dtype_name
from automodel_fn.errors import BackendUnavailableError, ConfigError, itemized

_T = TypeVar("_T")
_NESTED = {"te_fp8": TEFp8Config}


def plain(config: object) -> dict[str, Any]:
    """The fields of a config as strings, numbers, booleans and None.

    Raises:
        ConfigError: FP8 by a recipe object, which has no name.
        BackendUnavailableError: cattrs is not installed.
    """
    converter = _cattrs().Converter()
    converter.register_unstructure_hook(torch.dtype, plain_value)
    converter.register_unstructure_hook(TEFp8Config, plain_value)
    return converter.unstructure(config)


def plain_value(value: Any) -> Any:
    """One field's value as a string, a number, a boolean or None.

    Raises:
        ConfigError: FP8 by a recipe object, which has no name.

    Example:
        >>> plain_value(torch.float32), plain_value(TEFp8Config("block")), plain_value(20)
        ('float32', 'block', 20)
    """
    if isinstance(value, torch.dtype):
        return dtype_name(value)
    if not isinstance(value, TEFp8Config):
        return value
    if isinstance(value.recipe, str):
        return value.recipe
    raise ConfigError(
        f"te_fp8={type(value.recipe).__name__} is a recipe object, which has no name to write; "
        "use TEFp8Config with the name of a recipe."
    )


def structured(data: object, kind: type[_T]) -> _T:
    """The config of a mapping of fields, by cattrs: every key has to be a field.

    Values are left to the config, which judges them as if it had been made in Python.

    Raises:
        ConfigError: It is no mapping, has keys that no field has, or wrong values; all of them are
            listed.
        BackendUnavailableError: cattrs is not installed.
    """
    if not isinstance(data, Mapping):
        raise ConfigError(f"backend={data!r} must be a mapping of fields, as {{'attn': 'sdpa'}}.")
    cattrs = _cattrs()
    try:
        return _converter(cattrs, kind).structure(data, kind)
    except cattrs.ClassValidationError as error:
        raise cannot_be_made(kind, data, tuple(_unknown(error, data))) from None


def cannot_be_made(kind: type, data: Mapping[Any, Any], unknown: Sequence[str]) -> ConfigError:
    """The error that lists unknown keys, given as lines, and all that is wrong with the values."""
    return ConfigError(
        itemized(
            "this BackendConfig cannot be made",
            [*unknown, *_wrong_values(_as_meant(data, kind), kind)],
            f"Fields: {', '.join(names_of(kind))}." if unknown else "",
        )
    )


def _converter(cattrs: Any, kind: type) -> Any:
    converter = cattrs.Converter(forbid_extra_keys=True, detailed_validation=True)

    def kept(value: Any, _: object) -> Any:
        # By its own rules cattrs would make True of "no", and 20 of "20".
        return value

    def nested(value: Any, _: object) -> Any:
        return converter.structure(value, TEFp8Config) if isinstance(value, Mapping) else value

    hooks = {name: nested if name in _NESTED else kept for name in names_of(kind)}
    overrides = {name: cattrs.override(struct_hook=hook) for name, hook in hooks.items()}
    hook = cattrs.gen.make_dict_structure_fn(kind, converter, **overrides)
    converter.register_structure_hook(kind, hook)
    return converter


def _unknown(error: Any, data: Mapping[Any, Any], path: str = "") -> Iterator[str]:
    """What cattrs found to be no field, in the order in which it was written."""
    named, others = error.group_exceptions()
    for each in others:
        extra = getattr(each, "extra_fields", ())
        yield from (f"{path}{no_field(key, names_of(each.cl))}" for key in data if key in extra)
    for each, note in named:
        yield from _unknown(each, data[note.name], f"{path}{note.name}: ")


def _as_meant(data: Mapping[Any, Any], kind: type) -> dict[str, Any]:
    """The fields as their nearest names, so that the values behind wrong keys are judged too."""
    names = names_of(kind)
    near = {key if key in names else _nearest(key, names): value for key, value in data.items()}
    fields = {name: value for name, value in near.items() if name} | {
        name: data[name] for name in names if name in data
    }
    return {
        name: _as_meant(value, _NESTED[name])
        if name in _NESTED and isinstance(value, Mapping)
        else value
        for name, value in fields.items()
    }


def _wrong_values(fields: Mapping[str, Any], kind: type) -> list[str]:
    try:
        kind(**fields)
    except ConfigError as error:
        return [line.strip() for line in str(error).splitlines()[1:]]
    return []


def names_of(kind: type) -> list[str]:
    """The names of a config's fields, in order."""
    return [each.name for each in attrs.fields(kind)]


def no_field(key: object, names: Sequence[str]) -> str:
    """That a key is no field, with the nearest one.

    Example:
        >>> no_field("atn", ["attn", "linear"])
        "'atn' is no field; did you mean 'attn'?"
    """
    near = _nearest(key, names)
    return f"{key!r} is no field" + (f"; did you mean {near!r}?" if near else "")


def _nearest(key: object, names: Sequence[str]) -> str:
    near = get_close_matches(str(key).replace("-", "_").lower(), names, n=1)
    return near[0] if near else ""


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
        raise _not_installed("YAML", "PyYAML", "write JSON") from error
    return yaml


def _cattrs() -> Any:
    try:
        import cattrs
    except ModuleNotFoundError as error:
        what = "a backend as data (dict, JSON, YAML)"
        raise _not_installed(what, "cattrs", "make a BackendConfig of its fields") from error
    return cattrs


def _not_installed(what: str, package: str, instead: str) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"{what} needs {package}, which is not installed; run pip install 'automodel_fn[config]', "
        f"or {instead}."
    )
