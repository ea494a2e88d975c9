"""The spellings that configs have for rotary embeddings, read into one: flat parameters by type."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

from automodel_fn.errors import ConfigError

Get = Callable[[str], Any]
"""Reads one attribute of a config; None if there is none."""

EVERY_LAYER = ""
"""Stands for the layer type where a config makes no difference between them."""

_NAMES_OF_THETA = ("rope_theta", "rotary_emb_base", "global_rope_theta")
_NAMES_OF_PARTIAL = ("partial_rotary_factor", "rotary_pct")
# Whether the scaling holds for sliding attention too: in ModernBERT it did, in Gemma 3 not.
_NAMES_OF_LOCAL_THETA = {"rope_local_base_freq": False, "local_rope_theta": True}
_NAMES_OF_DEFAULTS = {"full_attention": "global", "sliding_attention": "local"}
_NEVER_A_LAYER_TYPE = ("rope_theta", "rope_type", "type", "partial_rotary_factor", "factor")


def parameters_by_type(get: Get) -> dict[str, dict[str, Any] | None]:
    """Flat parameters for each layer type, with theta and type; None for one without rotary.

    They are what the config says, looked at no further.

    Raises:
        ConfigError: It says nothing, or not in dicts.

    Example:
        >>> parameters_by_type({"rope_theta": 1e4, "rope_scaling": {"type": "yarn"}}.get)
        {'': {'rope_type': 'yarn', 'rope_theta': 10000.0}}
    """
    entries = _entries(get)
    return {
        kind: None if entry is None else _completed(kind, entry, get)
        for kind, entry in entries.items()
    }


def _entries(get: Get) -> dict[str, dict[str, Any] | None]:
    name = "rope_parameters" if get("rope_parameters") else "rope_scaling"
    stated = get(name) or {}
    if not isinstance(stated, Mapping):
        raise ConfigError(f"config.{name}={stated!r} must be a dict or None.")
    stated = cast("Mapping[str, Any]", stated)
    kinds = _layer_types(stated, get("_rope_type_labels") or get("layer_types") or ())
    if kinds:
        return _nested(name, stated, kinds)
    for local, is_scaled in _NAMES_OF_LOCAL_THETA.items():
        if name == "rope_scaling" and get(local) is not None:
            sliding = {**(_one_spelling(stated) if is_scaled else {}), "rope_theta": get(local)}
            return {"full_attention": _one_spelling(stated), "sliding_attention": sliding}
    if not stated and _first(get, _NAMES_OF_THETA) is None:
        part = "config.text_config" if get("text_config") is not None else "the part that has it"
        raise ConfigError(
            "config says nothing about rotary embeddings: expected rope_parameters, or rope_theta "
            f"and rope_scaling; if it is a composite config, give {part}."
        )
    return {EVERY_LAYER: _one_spelling(stated)}


def _layer_types(stated: Mapping[str, Any], labels: Iterable[str]) -> list[str]:
    known = set(labels)
    dicts = {key for key, value in stated.items() if isinstance(value, Mapping)}
    if not dicts and not known & set(stated):
        return []
    nothing = {key for key, value in stated.items() if value is None} - {*_NEVER_A_LAYER_TYPE}
    return [key for key in stated if key in dicts | known | (set() if known else nothing)]


def _nested(
    name: str, stated: Mapping[str, Any], kinds: list[str]
) -> dict[str, dict[str, Any] | None]:
    shared = _one_spelling({key: value for key, value in stated.items() if key not in kinds})
    wrong = [kind for kind in kinds if not isinstance(stated[kind], Mapping | None)]
    if wrong:
        found = ", ".join(f"{kind}: {stated[kind]!r}" for kind in wrong)
        raise ConfigError(
            f"config.{name} must have a dict or None for a layer type, found {found}."
        )
    return {
        kind: None if stated[kind] is None else {**shared, **_one_spelling(stated[kind])}
        for kind in kinds
    }


def _one_spelling(entry: Mapping[str, Any]) -> dict[str, Any]:
    rest = {key: value for key, value in entry.items() if key not in ("type", "rope_type")}
    rope_type = entry.get("rope_type") or entry.get("type")
    return rest if rope_type is None else {"rope_type": rope_type, **rest}


def _completed(kind: str, entry: dict[str, Any], get: Get) -> dict[str, Any]:
    theta = entry.get("rope_theta")
    if theta is None:
        theta = _first(get, _NAMES_OF_THETA)
    if theta is None:
        theta = _default_theta(kind, get("default_theta"))
    part = entry.get("partial_rotary_factor")
    if part is None:
        part = _first(get, _NAMES_OF_PARTIAL)
    found = {"rope_type": "default", **entry, "rope_theta": theta}
    return found if part is None else {**found, "partial_rotary_factor": part}


def _default_theta(kind: str, default: Any) -> Any:
    if not isinstance(default, Mapping):
        return default
    by_type = cast("Mapping[str, Any]", default)
    return by_type.get(kind, by_type.get(_NAMES_OF_DEFAULTS.get(kind, kind)))


def _first(get: Get, names: Iterable[str]) -> Any:
    return next((value for value in map(get, names) if value is not None), None)
