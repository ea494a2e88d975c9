"""What transformers reads from a config at every call: which attention, which experts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import attrs

from automodel_fn.convert._around import Around
from automodel_fn.convert._entries import KEEP, SKIP, SWAP, ModuleSwap
from automodel_fn.convert._head_sizes import unfit_for_flex
from automodel_fn.convert._overlay import names_in
from automodel_fn.convert._parts import Part, is_experts


@attrs.frozen
class ConfigRule:
    """A field that acts through a setting of configs, which many modules read.

    Args:
        field: The field.
        attribute: The attribute of a config.
        words: The values of the attribute, by the field's words for them.
        reads: Whether a module reads the setting.
        refusal: Why these modules cannot have what was asked for, or "".
        unfit: Which of their sizes what was asked for cannot run, or "".
        instead: What to ask for where no module of a model fits.
    """

    field: str
    attribute: str = attrs.field(kw_only=True)
    words: Mapping[str, str] = attrs.field(kw_only=True)
    reads: Callable[[Part], bool] = attrs.field(kw_only=True)
    refusal: Callable[[Part, Around], str] = attrs.field(kw_only=True)
    unfit: Callable[[Part, Around], str] = attrs.field(kw_only=True)
    instead: str = attrs.field(kw_only=True)

    def readers(self, parts: Iterable[Part]) -> list[list[Part]]:
        """The modules that read the setting, together where they read it from one config."""
        found: dict[int, list[Part]] = {}
        for part in parts:
            if self.reads(part):
                found.setdefault(id(part.module.config), []).append(part)
        return list(found.values())

    def word(self, part: Part) -> str:
        """What the config of a module says, in the field's words."""
        config: Any = part.module.config
        value = str(getattr(config, self.attribute, None))
        return next((word for word, known in self.words.items() if known == value), value.lower())

    def value(self, word: str) -> str | None:
        """What a config has to say for a word of the field."""
        return None if word == "none" else self.words.get(word, word)

    def entry(self, readers: list[Part], around: Around) -> ModuleSwap:
        """What becomes of the modules that read one config."""
        asked, before = around.asked[self.field], self.word(readers[0])
        action, reason = self._decision(readers, around, asked, before)
        return ModuleSwap(
            tuple(part.names[0] for part in readers),
            field=self.field,
            module_class=readers[0].class_name,
            before=before,
            after=asked if action == SWAP else before,
            action=action,
            reason=reason,
        )

    def _decision(
        self, readers: list[Part], around: Around, asked: str, before: str
    ) -> tuple[str, str]:
        if asked == before:
            return KEEP, f"already {asked}"
        left = [p for p in readers if id(p.module) in around.skipped]
        if left:
            pattern = around.skipped[id(left[0].module)]
            shared = "" if len(left) == len(readers) else ", whose config all of these read"
            return SKIP, f"skip={pattern!r}{shared}"
        refusal = self.refusal(readers[0], around) or self.unfit(readers[0], around)
        if refusal:
            return SKIP, refusal
        return SWAP, f"{around.as_asked(self.field)}, by their config"

    def misfit(self, part: Part, around: Around) -> str:
        """Why modules that are skipped are unfit, or "" where something else is in the way."""
        return "" if self.refusal(part, around) else self.unfit(part, around)


def _reads_attention(part: Part) -> bool:
    has_config = hasattr(getattr(part.module, "config", None), "_attn_implementation")
    return has_config and "ALL_ATTENTION_FUNCTIONS" in names_in(part.own)


def _attention_refusal(part: Part, around: Around) -> str:
    asked = around.asked["attn"]
    supports = {"sdpa": "_supports_sdpa", "flex": "_supports_flex_attn"}
    if asked not in ("eager", *supports):
        return f"transformers has no attention {asked!r} for its own models"
    owners = (each for each in around.above(part) if hasattr(each.own, "_supports_sdpa"))
    owner = next(owners, None)
    if asked in supports and owner is not None and not getattr(owner.own, supports[asked]):
        return f"{owner.class_name} of transformers does not support {asked}"
    return ""


def _unfit_attention(part: Part, around: Around) -> str:
    is_flex = around.asked["attn"] == "flex"
    return unfit_for_flex(part.module) if is_flex and around.has_gpu else ""


def _no_refusal(part: Part, around: Around) -> str:
    return ""


def _unfit_experts(part: Part, around: Around) -> str:
    is_known = around.asked["experts"] in EXPERTS.words
    return "" if is_known else "transformers has no experts in MXFP8"


ATTENTION = ConfigRule(
    "attn",
    attribute="_attn_implementation_internal",
    words={"eager": "eager", "sdpa": "sdpa", "flex": "flex_attention"},
    reads=_reads_attention,
    refusal=_attention_refusal,
    unfit=_unfit_attention,
    instead="say attn='auto', or 'eager'",
)
EXPERTS = ConfigRule(
    "experts",
    attribute="_experts_implementation_internal",
    words={"torch": "eager", "torch_mm": "grouped_mm"},
    reads=is_experts,
    refusal=_no_refusal,
    unfit=_unfit_experts,
    instead="say experts='auto', or 'te' with te_fp8='mxfp8'",
)
