"""Backend plans as JSON text, and back; errors name the place in the text."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from automodel_fn.backend._fp8 import RECIPES
from automodel_fn.convert._recipes import RecipeWord
from automodel_fn.errors import ConfigError

if TYPE_CHECKING:
    from automodel_fn.convert._entries import ModuleSwap
    from automodel_fn.convert._plan import BackendPlan

FORMAT = "automodel_fn.backend_plan/1"
_WORDS = ("field", "module_class", "before", "after", "action", "reason")


def plan_to_json(plan: BackendPlan) -> str:
    """One entry a line, so that two plans can be compared by line.

    Raises:
        ConfigError: FP8 by a recipe object, which has no name.
    """
    _demand_words(plan)
    head = json.dumps({"format": FORMAT, "notes": list(plan.notes)})
    lines = (
        json.dumps({"names": list(entry.names), **{word: getattr(entry, word) for word in _WORDS}})
        for entry in plan.entries
    )
    entries = ",\n  ".join(lines)
    body = f"[\n  {entries}\n ]" if entries else "[]"
    return f'{head[:-1]}, "entries": {body}}}\n'


def _demand_words(plan: BackendPlan) -> None:
    for entry in plan.entries:
        for word in (entry.before, entry.after):
            if isinstance(word, RecipeWord):
                raise ConfigError(
                    f"{entry.label}, {entry.field}: {word} is a recipe object, which has no name "
                    f"to write; use one of {', '.join(map(repr, RECIPES))}, or plan where the plan "
                    "is applied."
                )


def plan_from_json(
    text: str, plan_type: type[BackendPlan], entry_type: type[ModuleSwap]
) -> BackendPlan:
    """Read what `plan_to_json` wrote.

    Raises:
        ConfigError: Not JSON, another format, or a field that is missing or of another kind.
    """
    try:
        data = json.loads(text)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the text is no JSON: {error}.") from None
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ConfigError(f"the JSON is no backend plan: expected format={FORMAT!r}.")
    entries = data.get("entries")
    if not isinstance(entries, list):
        raise ConfigError(f"plan.entries={entries!r} must be a list.")
    notes = _strings(data.get("notes"), "plan.notes")
    return plan_type(
        tuple(_entry(item, f"entries[{i}]", entry_type) for i, item in enumerate(entries)),
        notes=notes,
    )


def _entry(item: object, place: str, entry_type: type[ModuleSwap]) -> ModuleSwap:
    if not isinstance(item, dict):
        raise ConfigError(f"{place}={item!r} must be an object.")
    names = _strings(item.get("names"), f"{place}.names")
    if not names:
        raise ConfigError(f"{place}.names=[] must name the module.")
    words: dict[str, Any] = {word: item.get(word) for word in _WORDS}
    for word, value in words.items():
        if not isinstance(value, str):
            raise ConfigError(f"{place}.{word}={value!r} must be a str.")
    try:
        return entry_type(names, **words)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{place}: {error.args[0]}") from None


def _strings(values: object, place: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ConfigError(f"{place}={values!r} must be a list of strings.")
    return tuple(values)
