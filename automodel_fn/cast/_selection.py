"""Which tensors the patterns of an argument name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from automodel_fn.cast._tensors import ModelScan, NamedTensor
from automodel_fn.errors import ConfigError
from automodel_fn.fqn import (
    Pattern,
    ancestry,
    parse_patterns,
    unmatched_message,
    without_parametrizations,
)


def selected(model_scan: ModelScan, value: str | Iterable[str], argument: str) -> dict[int, str]:
    """For each tensor that is named (by its index) the first pattern that names it.

    A pattern names a tensor by any of its names, with or without wrappers, or a module and with it
    everything beneath.

    Raises:
        ConfigError: A pattern matches no tensor and no module; all such are listed.
    """
    patterns = parse_patterns(value, argument)
    if not patterns:
        return {}
    used: set[str] = set()
    known: dict[str, Pattern | None] = {}
    chosen: dict[int, str] = {}
    for index, item in enumerate(model_scan.tensors):
        for name in _spellings(item):
            for part in ancestry(name):
                pattern = _first_match(part, patterns, known, used)
                if pattern is not None:
                    chosen.setdefault(index, pattern.text)
    unmatched = [pattern for pattern in patterns if pattern.text not in used]
    unmatched = [p for p in unmatched if not _names_empty_module(p, model_scan)]
    if unmatched:
        names = [name for item in model_scan.tensors for name in item.names]
        modules = [name for name, _, _ in model_scan.modules if name]
        raise ConfigError(unmatched_message(argument, unmatched, [*modules, *names]))
    return chosen


def _spellings(item: NamedTensor) -> Iterable[str]:
    plain = (*item.names, *item.raw_names)
    return dict.fromkeys([*plain, *(without_parametrizations(name) for name in plain)])


def _first_match(
    name: str, patterns: Sequence[Pattern], known: dict[str, Pattern | None], used: set[str]
) -> Pattern | None:
    if name not in known:
        matching = [pattern for pattern in patterns if pattern.matches(name)]
        used.update(pattern.text for pattern in matching)
        known[name] = matching[0] if matching else None
    return known[name]


def _names_empty_module(pattern: Pattern, model_scan: ModelScan) -> bool:
    return any(
        pattern.matches(spelling)
        for name, raw_name, _ in model_scan.modules
        for spelling in (name, raw_name)
        if spelling
    )
