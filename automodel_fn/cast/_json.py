"""Cast plans as JSON text, and back; errors name the place in the text."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from automodel_fn.dtypes import dtype_name, parse_dtype
from automodel_fn.errors import ConfigError

if TYPE_CHECKING:
    from automodel_fn.cast._entries import TensorCast
    from automodel_fn.cast._plan import CastPlan

FORMAT = "automodel_fn.cast_plan/1"


def plan_to_json(plan: CastPlan) -> str:
    """One entry a line, so that two plans can be compared by line."""
    head = {
        "format": FORMAT,
        "dtype": None if plan.dtype is None else dtype_name(plan.dtype),
        "notes": list(plan.notes),
        **({} if plan.inverse_of is None else {"inverse_of": dtype_name(plan.inverse_of)}),
    }
    entries = ",\n  ".join(json.dumps(_entry_to_dict(entry)) for entry in plan.entries)
    body = f"[\n  {entries}\n ]" if entries else "[]"
    return f'{json.dumps(head)[:-1]}, "entries": {body}}}\n'


def _entry_to_dict(entry: TensorCast) -> dict[str, Any]:
    return {
        "names": list(entry.names),
        "kind": entry.kind,
        "shape": list(entry.shape),
        "from_dtype": dtype_name(entry.from_dtype),
        "to_dtype": dtype_name(entry.to_dtype),
        "action": entry.action,
        "reason": entry.reason,
        "requires_grad": entry.requires_grad,
        **({} if entry.inverse_of is None else {"inverse_of": entry.inverse_of}),
    }


def plan_from_json(text: str, plan_type: type[CastPlan], entry_type: type[TensorCast]) -> CastPlan:
    """Read what `plan_to_json` wrote.

    Raises:
        ConfigError: Not JSON, another format, or a field that is missing or of another kind.
    """
    try:
        data = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the text is no JSON: {error}.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f"the JSON is no cast plan: expected format={FORMAT!r}.")
    entries = _field(data, "entries", list, "plan")
    notes = _strings(_field(data, "notes", list, "plan"), "plan.notes")
    return plan_type(
        tuple(_entry_from(item, f"entries[{i}]", entry_type) for i, item in enumerate(entries)),
        dtype=_optional_dtype(data, "dtype"),
        notes=notes,
        inverse_of=_optional_dtype(data, "inverse_of"),
    )


def _entry_from(item: object, place: str, entry_type: type[TensorCast]) -> TensorCast:
    if not isinstance(item, dict):
        raise ConfigError(f"{place}={item!r} must be an object.")
    data: dict[str, Any] = item
    shape = _field(data, "shape", list, place)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ConfigError(f"{place}.shape={shape!r} must be whole numbers of at least 0.")
    names = _strings(_field(data, "names", list, place), f"{place}.names")
    if not names:
        raise ConfigError(f"{place}.names=[] must name the tensor.")
    try:
        return entry_type(
            names,
            kind=_field(data, "kind", str, place),
            shape=tuple(shape),
            from_dtype=_dtype(data, "from_dtype", place),
            to_dtype=_dtype(data, "to_dtype", place),
            action=_field(data, "action", str, place),
            reason=_field(data, "reason", str, place),
            requires_grad=_field(data, "requires_grad", bool, place),
            inverse_of=data.get("inverse_of"),
        )
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{place}: {error.args[0]}") from None


def _optional_dtype(data: Mapping[str, Any], name: str) -> torch.dtype | None:
    return None if data.get(name) is None else _dtype(data, name, "plan")


def _dtype(data: Mapping[str, Any], name: str, place: str) -> torch.dtype:
    try:
        return parse_dtype(_field(data, name, str, place))
    except ConfigError as error:
        raise ConfigError(f"{place}.{name}: {error}") from None


def _field(data: Mapping[str, Any], name: str, kind: type, place: str) -> Any:
    value = data.get(name)
    if type(value) is not kind:
        raise ConfigError(f"{place}.{name}={value!r} must be a {kind.__name__}.")
    return value


def _strings(values: list[Any], place: str) -> tuple[str, ...]:
    if not all(isinstance(value, str) for value in values):
        raise ConfigError(f"{place}={values!r} must be strings.")
    return tuple(values)
