"""Law of resolving a backend: what runs can run, it is what was asked for, and all has a reason."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import attrs

from automodel_fn.backend._availability import Availability
from automodel_fn.backend._config import BackendConfig
from automodel_fn.backend._fp8 import TEFp8Config
from automodel_fn.backend._resolve import Resolution, resolve
from automodel_fn.backend._rules import PREFERRED
from automodel_fn.errors import BackendUnavailableError, ConfigError
from automodel_fn.testing._facts import demand, demand_none


def check_resolve(config: BackendConfig, availability: Availability) -> None:
    """Law: what is resolved can run, is explained, and is what was asked for.

    Idempotent: resolving the result gives it again. Explained: every field has a reason, and only
    "auto" becomes something else. Runnable: each value has a verdict that says so. Best: no value
    that "auto" prefers could have been taken instead. Pure: the same arguments, which stay as they
    are, give equal results. Where it is refused, the error names all that was asked for by name and
    cannot run, and something could not be had indeed.

    Args:
        config: What is asked for.
        availability: The machine.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> check_resolve(BackendConfig(), Availability(python="3.12.0", torch="2.13.0"))
    """
    before = copy.deepcopy((config, availability))
    try:
        found = resolve(config, availability)
    except BackendUnavailableError as error:
        _demand_complete(config, availability, str(error))
        return
    demand((config, availability) == before, "resolving changed its arguments")
    demand(resolve(config, availability) == found, "resolving is not pure: twice gave two results")
    demand_none("not explained", _unexplained(config, found))
    refused = _refused(found.backend, availability)
    demand_none("not runnable", (f"{name}: {reason}" for name, reason in refused.items()))
    again = resolve(found.backend, availability).backend
    demand(again == found.backend, "not idempotent: resolving the result gives another one")
    demand_none("not the best", _better(config, found.backend, availability))


def _values(config: BackendConfig) -> Iterator[tuple[str, Any]]:
    for field in attrs.fields(BackendConfig):
        yield field.name, getattr(config, field.name)


def _refused(config: BackendConfig, availability: Availability) -> dict[str, str]:
    """The values that a verdict speaks against, and those of which "auto" is left."""
    verdicts = {verdict.backend: verdict for verdict in availability.verdicts()}
    judged = {name.partition("=")[0] for name in verdicts}
    refused: dict[str, str] = {}
    for name, value in _values(config):
        if name not in judged or value is None:
            continue
        word = value.kind if isinstance(value, TEFp8Config) else value
        verdict = verdicts.get(f"{name}={word}")
        if verdict is None or not verdict.can_run:
            refused[name] = verdict.reason if verdict else f"{word} has no verdict"
    return refused


def _unexplained(config: BackendConfig, found: Resolution) -> Iterator[str]:
    asked, runs = dict(_values(config)), dict(_values(found.backend))
    names = [each.name for each in found.fields]
    if names != list(asked):
        yield f"the fields are {names}, expected {list(asked)}"
        return
    for each in found.fields:
        if (each.asked, each.runs) != (asked[each.name], runs[each.name]):
            yield f"{each.name} is told as {each.asked!r} -> {each.runs!r}, and is not so"
        if not each.reason.strip():
            yield f"{each.name} has no reason"
        if each.runs != each.asked and each.asked != "auto":
            yield f"{each.name}={each.asked!r} was asked for by name, and {each.runs!r} runs"


def _better(
    config: BackendConfig, runs: BackendConfig, availability: Availability
) -> Iterator[str]:
    for name, order in PREFERRED.items():
        if getattr(config, name) != "auto":
            continue
        for value in order[: order.index(getattr(runs, name))]:
            try:
                other = attrs.evolve(runs, **{name: value})
            except ConfigError:
                continue
            if name not in _refused(other, availability):
                yield f"{name}={getattr(runs, name)!r} runs, and {value!r} could"


def _demand_complete(config: BackendConfig, availability: Availability, text: str) -> None:
    named = {
        name: reason
        for name, reason in _refused(config, availability).items()
        if getattr(config, name) != "auto"
    }
    lines = text.splitlines()
    missing = [
        name
        for name, reason in named.items()
        if not any(line.strip().startswith(f"{name}=") and reason in line for line in lines)
    ]
    demand_none("the error does not say why these cannot run", missing)
    if not named:
        demand_none("refused, and yet this can run", _witness(config, availability))


def _witness(config: BackendConfig, availability: Availability) -> Iterator[str]:
    """A way to choose for "auto" that the machine can run; slow and obvious."""
    open_fields = [name for name in PREFERRED if getattr(config, name) == "auto"]
    tried = [config]
    for name in open_fields:
        tried = [each for config in tried for each in _with_each(config, name)]
    for each in tried:
        if not _refused(each, availability):
            yield str({name: getattr(each, name) for name in open_fields})
            return


def _with_each(config: BackendConfig, name: str) -> Iterator[BackendConfig]:
    for value in PREFERRED[name]:
        try:
            yield attrs.evolve(config, **{name: value})
        except ConfigError:
            continue
