"""Whether a model is still as a backend plan found it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from automodel_fn.cast._tensors import ModelScan
from automodel_fn.convert._around import Around, look_around
from automodel_fn.convert._entries import SWAP, ModuleSwap
from automodel_fn.convert._parts import Part
from automodel_fn.convert._plan import BackendPlan
from automodel_fn.convert._rulebook import CONFIG_RULES, MODULE_RULES
from automodel_fn.convert._rules import common_refusal
from automodel_fn.errors import StalePlanError, itemized


def refuse_stale(plan: BackendPlan, parts: Sequence[Part], model_scan: ModelScan) -> None:
    """Raise if the model is no longer as the plan found it.

    Raises:
        StalePlanError: With every difference.
    """
    by_name = {part.names[0]: part for part in parts}
    found = [*_findings(plan, parts, by_name, model_scan), *_unknown(plan, parts, model_scan)]
    if found:
        raise StalePlanError(
            itemized(
                f"the backend plan no longer fits the model: {len(found)} differences "
                f"over {len(plan.entries)} entries",
                found,
                "Nothing was changed. Plan again with backend_plan.",
            )
        )


def _findings(
    plan: BackendPlan, parts: Sequence[Part], by_name: dict[str, Part], model_scan: ModelScan
) -> Iterator[str]:
    asked = {entry.field: entry.after for entry in plan.entries if entry.action == SWAP}
    defaults = {rule.field: rule.own for rule in MODULE_RULES.values()}
    around = look_around(parts, model_scan, defaults | asked)
    for entry in plan.entries:
        is_known = entry.field in MODULE_RULES or entry.field in CONFIG_RULES
        finding = _finding(entry, by_name, around) if is_known else "there is no such field"
        if finding:
            yield f"{entry.label}, {entry.field}: {finding}"


def _finding(entry: ModuleSwap, by_name: dict[str, Part], around: Around) -> str:
    part = by_name.get(entry.name)
    if part is None:
        return "planned, but not in the model"
    if part.class_name != entry.module_class:
        return f"planned as a {entry.module_class}, found a {part.class_name}"
    rule = MODULE_RULES.get(entry.field)
    if rule is None:
        return _config_finding(entry, part, by_name)
    if part.names != entry.names:
        return f"planned under the names {entry.names}, found under {part.names}"
    now = part.settings.get(entry.field, rule.own)
    if now != entry.before:
        return f"planned from {entry.before}, found {now}"
    if entry.action != SWAP:
        return ""
    if not rule.is_candidate(part, around):
        return "planned, but the field has nothing to do with it"
    return common_refusal(part) or ("" if entry.after == rule.own else rule.refusal(part, around))


def _config_finding(entry: ModuleSwap, part: Part, by_name: dict[str, Part]) -> str:
    rule = CONFIG_RULES[entry.field]
    readers = [each for each in rule.readers(by_name.values()) if each[0] is part]
    names = tuple(each.names[0] for each in readers[0]) if readers else ()
    if names != entry.names:
        return f"planned for {len(entry.names)} readers of one config, found {len(names)}"
    now = rule.word(part)
    return "" if now == entry.before else f"planned from {entry.before}, found {now}"


def _unknown(plan: BackendPlan, parts: Sequence[Part], model_scan: ModelScan) -> Iterator[str]:
    """Modules that a field of the plan acts on, and that the plan does not know.

    Of the fields of which a plan lists every module; others list what they change.
    """
    planned = {(entry.name, entry.field) for entry in plan.entries}
    fields = {entry.field for entry in plan.entries}
    asked = {entry.field: entry.after for entry in plan.entries}
    around = look_around(parts, model_scan, asked)
    listed = {field: rule for field, rule in MODULE_RULES.items() if rule.is_listed}
    for field, rule in listed.items():
        for part in parts if field in fields else ():
            is_planned = (part.names[0], field) in planned
            if not is_planned and rule.is_candidate(part, around):
                yield f"{part.names[0] or '(model)'}, {field}: in the model, but not in the plan"
