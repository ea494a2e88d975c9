"""What decides about a module: one rule a field."""

from __future__ import annotations

from collections.abc import Callable

import attrs

from automodel_fn.convert._around import Around
from automodel_fn.convert._entries import KEEP, SKIP, SWAP, ModuleSwap
from automodel_fn.convert._parts import Part
from automodel_fn.convert._settings import is_covered

Refusal = Callable[[Part, Around], str]


def _no_refusal(part: Part, around: Around) -> str:
    return ""


@attrs.frozen
class Rule:
    """What a field of a backend has to do with a module.

    Args:
        field: The field.
        own: The word for what the module does of itself.
        is_candidate: Whether the field has anything to do with the module.
        refusal: Why the module cannot be exchanged for what was asked for, or "".
        unfit: Which of its sizes or dtypes what was asked for cannot run, or "".
        instead: What to ask for where no module of a model fits.
        keeping: Why the module is better left as it is, or "".
        is_listed: Whether modules are listed also where they run and were asked to run as they are.
        remark: What is to be known of a swapped module, after who asked for it.
    """

    field: str
    own: str = attrs.field(kw_only=True)
    is_candidate: Callable[[Part, Around], bool] = attrs.field(kw_only=True)
    refusal: Refusal = attrs.field(default=_no_refusal, kw_only=True)
    unfit: Refusal = attrs.field(default=_no_refusal, kw_only=True)
    instead: str = attrs.field(default="", kw_only=True)
    keeping: Refusal = attrs.field(default=_no_refusal, kw_only=True)
    is_listed: bool = attrs.field(default=False, kw_only=True)
    remark: str = attrs.field(default="", kw_only=True)

    def entry(self, part: Part, around: Around) -> ModuleSwap | None:
        """What becomes of a module; None if it is none of this field's business."""
        asked = around.asked[self.field]
        before = part.settings.get(self.field, self.own)
        is_idle = asked == before == self.own and not self.is_listed
        if is_idle or not self.is_candidate(part, around):
            return None
        action, reason = self._decision(part, around, asked, before)
        return ModuleSwap(
            part.names,
            field=self.field,
            module_class=part.class_name,
            before=before,
            after=asked if action == SWAP else before,
            action=action,
            reason=reason,
        )

    def _decision(self, part: Part, around: Around, asked: str, before: str) -> tuple[str, str]:
        pattern = around.skipped.get(id(part.module))
        if pattern is not None:
            return SKIP, f"skip={pattern!r}"
        who = around.as_asked(self.field)
        if asked == before:
            words = f"already {asked}" if asked != self.own else f"its own code, {who}"
            return KEEP, words
        refusal = common_refusal(part)
        if asked != self.own:
            keeping = self.keeping(part, around)
            if keeping:
                return KEEP, keeping
            refusal = refusal or self.refusal(part, around) or self.unfit(part, around)
        if refusal:
            return SKIP, refusal
        return SWAP, who if asked == self.own else who + self.remark

    def misfit(self, part: Part, around: Around) -> str:
        """Why a module that is skipped is unfit, or "" where something else is in the way."""
        if common_refusal(part) or self.refusal(part, around):
            return ""
        return self.unfit(part, around)


def common_refusal(part: Part) -> str:
    """Why nothing can be made of a module, whatever the field; or ""."""
    if is_covered(type(part.module)):
        return "somebody else has made a class over one that was made here; take that back first"
    if "forward" in vars(part.module):
        return "its forward was replaced on the module itself, and would hide any other"
    return ""
