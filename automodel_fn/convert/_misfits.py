"""What was asked for by name and no module of a model has the sizes or the dtype for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from automodel_fn.convert._around import Around
from automodel_fn.convert._entries import KEEP, SKIP, ModuleSwap
from automodel_fn.convert._experts import GROUPED_EXPERTS_RULE
from automodel_fn.convert._rule_configs import ConfigRule
from automodel_fn.convert._rulebook import CONFIG_RULES, MODULE_RULES
from automodel_fn.convert._rules import Rule

_GROUPED = GROUPED_EXPERTS_RULE.field
_MOST = 3


def misfits(around: Around, by_field: Mapping[str, Sequence[ModuleSwap]]) -> Iterator[str]:
    """One line for each field that was asked for by name and that every module is unfit for.

    Where only some modules are, or where a module's own code is in the way, the plan says so.
    """
    rules: Mapping[str, Rule | ConfigRule] = {**CONFIG_RULES, **MODULE_RULES}
    for field in around.asked:
        if field in around.chosen or is_other_half(field, around):
            continue
        entries = [each for each in by_field.get(field, ()) if not _is_left(each, around)]
        reasons = [_misfit(rules[field], each, around) for each in entries]
        if reasons and all(reasons):
            told = list(dict.fromkeys(reasons))
            more = f"; and {len(told) - _MOST} more" if len(told) > _MOST else ""
            name, value = words(field, around.asked[field])
            yield (
                f"{name}={value!r}: no module of this model can have it: "
                f"{'; '.join(told[:_MOST])}{more}; {rules[field].instead}"
            )


def is_other_half(field: str, around: Around) -> bool:
    """Whether another field of the plan says what became of the field of the backend."""
    # Grouped experts that cannot be ours are transformers', where it has a forward for them.
    is_grouped = field == _GROUPED and "experts" in around.asked
    return is_grouped or (field == "attn" and around.asked["te_attn"] == "True")


def words(field: str, choice: str) -> tuple[str, str]:
    """Field and value of a BackendConfig, of what a plan asks for.

    Example:
        >>> words("te_attn", "True"), words("linear", "te")
        (('attn', 'te'), ('linear', 'te'))
    """
    if field == "te_attn":
        return "attn", "te"
    return "experts" if field == _GROUPED else field, choice


def _is_left(entry: ModuleSwap, around: Around) -> bool:
    """Whether nobody asked for it in this module: in `skip`, or better left, as a head is."""
    if entry.action == KEEP:
        return entry.after != around.asked[entry.field]
    return entry.action == SKIP and id(around.by_name[entry.name].module) in around.skipped


def _misfit(rule: Rule | ConfigRule, entry: ModuleSwap, around: Around) -> str:
    if entry.action != SKIP:
        return ""
    return rule.misfit(around.by_name[entry.name], around)
