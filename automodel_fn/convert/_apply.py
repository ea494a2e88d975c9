"""Carry a backend plan out."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from automodel_fn.convert._changes import Change, ConfigChange, carry_out, class_change
from automodel_fn.convert._compare import refuse_stale
from automodel_fn.convert._entries import SWAP, ModuleSwap
from automodel_fn.convert._parts import Part, scanned
from automodel_fn.convert._plan import BackendPlan
from automodel_fn.convert._report import SwapReport
from automodel_fn.convert._rulebook import CONFIG_RULES, MODULE_RULES
from automodel_fn.errors import ConfigError, itemized
from automodel_fn.plans import WeakObjects, apply

_logger = logging.getLogger("automodel_fn")


@apply.register
def apply_backend_plan(
    plan: BackendPlan,
    model: nn.Module | None = None,
    *,
    keep_originals: bool = False,
    checksum: bool = False,
) -> SwapReport:
    """Carry a backend plan out, wholly or not at all; see `apply`.

    No tensor is changed, so that the report can always undo, and there is nothing to take a
    checksum of.
    """
    if checksum:
        raise ConfigError("checksum=True: a backend plan changes no tensor; leave it out.")
    target = plan.model() if model is None else model
    _swap(plan, target)
    if plan.notes:
        _logger.warning(itemized("the backend plan has notes:", plan.notes))
    return SwapReport(
        plan.entries, notes=plan.notes, undo_swap=_Undo(plan.inverse(), WeakObjects(target))
    )


def _swap(plan: BackendPlan, target: nn.Module) -> None:
    model_scan, parts = scanned(target)
    refuse_stale(plan, parts, model_scan)
    by_name = {part.names[0]: part for part in parts}
    swaps = [entry for entry in plan.entries if entry.action == SWAP]
    carry_out([*_class_changes(swaps, by_name), *_config_changes(swaps, by_name)])


class _Undo:
    """Applies the inverse to the model that was swapped, if it still exists."""

    def __init__(self, inverse: BackendPlan, target: WeakObjects) -> None:
        self._inverse, self._target = inverse, target

    def __call__(self) -> None:
        for model in self._target.alive():
            _swap(self._inverse, model)


def _class_changes(swaps: Iterable[ModuleSwap], by_name: dict[str, Part]) -> Iterator[Change]:
    """One change a module, of all of its fields together."""
    settings: dict[str, dict[str, str]] = {}
    for entry in swaps:
        rule = MODULE_RULES.get(entry.field)
        if rule is None:
            continue
        found = settings.setdefault(entry.name, by_name[entry.name].settings)
        if entry.after == rule.own:
            del found[entry.field]
        else:
            found[entry.field] = entry.after
    for name, found in settings.items():
        yield class_change(by_name[name].module, found)


def _config_changes(swaps: Iterable[ModuleSwap], by_name: dict[str, Part]) -> Iterator[Change]:
    for entry in swaps:
        rule = CONFIG_RULES.get(entry.field)
        if rule is not None:
            module: Any = by_name[entry.name].module
            yield ConfigChange(module.config, name=rule.attribute, value=rule.value(entry.after))
