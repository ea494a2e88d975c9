"""Results as JSON text, and back. Pure."""

from __future__ import annotations

import json
from types import UnionType
from typing import TYPE_CHECKING, Any, get_args

import attrs

from automodel_fn.errors import ConfigError

if TYPE_CHECKING:
    from automodel_fn.bench._result import BenchmarkResult

FORMAT = "automodel_fn.benchmark/3"
_PAIRS = ("values", "facts", "packages", "summaries", "ratios")


def result_to_json(result: BenchmarkResult) -> str:
    """The result, with its rows added for readers that do not have this library."""
    data = {"format": FORMAT, **_to_plain(result), "rows": _to_plain(result.rows())}
    return json.dumps(data, indent=1) + "\n"


def _to_plain(value: Any, field: str = "") -> Any:
    """Values as objects, tuples as arrays, pairs as objects."""
    if attrs.has(type(value)):
        names = (item.name for item in attrs.fields(type(value)))
        return {name: _to_plain(getattr(value, name), name) for name in names}
    if field in _PAIRS:
        return {name: _to_plain(item) for name, item in value}
    if isinstance(value, tuple):
        return [_to_plain(item) for item in value]  # pyright: ignore[reportUnknownVariableType]
    return value


def result_from_json(text: str, result_type: type[BenchmarkResult]) -> BenchmarkResult:
    """Read what `result_to_json` wrote.

    Raises:
        ConfigError: Not JSON, another format, or a field that is missing or unknown.
    """
    try:
        data = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the text is no JSON: {error}.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f"the JSON is no benchmark result: expected format={FORMAT!r}.")
    fields = {k: v for k, v in data.items() if k not in ("format", "rows")}
    return _from_plain(result_type, fields, "result")


def _from_plain(kind: Any, data: Any, place: str) -> Any:
    if not isinstance(data, dict):
        raise ConfigError(f"{place}={data!r} must be an object.")
    types = attrs.fields_dict(attrs.resolve_types(kind))
    differing = sorted(set(types) ^ set(data))
    if differing:
        raise ConfigError(
            f"{place} has the fields {', '.join(map(str, data))}; "
            f"missing or unknown: {', '.join(map(str, differing))}."
        )
    made = {n: _field(types[n].type, n, value, f"{place}.{n}") for n, value in data.items()}
    return kind(**made)


def _field(kind: Any, name: str, value: Any, place: str) -> Any:
    if name in _PAIRS:
        if not isinstance(value, dict):
            raise ConfigError(f"{place}={value!r} must be an object.")
        return tuple(value.items())
    if attrs.has(kind):
        return _from_plain(kind, value, place)
    if isinstance(kind, type | UnionType):
        return _checked(kind, value, place)
    item_type = get_args(kind)[0]
    items = _checked(list, value, place)
    return tuple(
        _from_plain(item_type, item, f"{place}[{index}]")
        if attrs.has(item_type)
        else _checked(item_type, item, f"{place}[{index}]")
        for index, item in enumerate(items)
    )


def _checked(kind: Any, value: Any, place: str) -> Any:
    if not isinstance(value, kind):
        raise ConfigError(f"{place}={value!r} must be of type {getattr(kind, '__name__', kind)}.")
    return value
