"""Which tensors stay in float32, and by which rule.

A model declares fp32 pins by keywords, in `_keep_in_fp32_modules` and
`_keep_in_fp32_modules_strict` (the attributes of Hugging Face transformers). A keyword applies in
the subtree of the module that declares it, to names without wrappers and relative to that module.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import attrs
import torch
from torch import nn

from automodel_fn.cast._fsdp import class_of
from automodel_fn.cast._tensors import NONPERSISTENT_BUFFER, ModelScan, NamedTensor
from automodel_fn.errors import BackendUnavailableError, ConfigError
from automodel_fn.fqn import ancestry, has_segments, without_parametrizations

STRICT, PLAIN = "_keep_in_fp32_modules_strict", "_keep_in_fp32_modules"
MATCHES = ("substring", "segment", "hf")
_HF_DTYPES = {PLAIN: (torch.float16,), STRICT: (torch.float16, torch.bfloat16)}


@attrs.frozen
class Declaration:
    """One keyword that a module of the model declares.

    Args:
        keyword: The keyword.
        owner: FQN of the declaring module; "" is the root.
        source: Where it stands, as "LlamaModel._keep_in_fp32_modules".
        hits: Whether it matches a name that is relative to the owner.
    """

    keyword: str
    owner: str = attrs.field(kw_only=True)
    source: str = attrs.field(kw_only=True)
    hits: Callable[[str], bool] = attrs.field(kw_only=True, eq=False, repr=False)

    def __str__(self) -> str:
        """The declaration in words."""
        at = f" (at {self.owner})" if self.owner else ""
        return f"keyword {self.keyword!r} of {self.source}{at}"


@attrs.frozen
class Pins:
    """The fp32 pins of a model: for each pinned tensor (by its index) the rule, and remarks."""

    reasons: dict[int, str]
    notes: tuple[str, ...] = attrs.field(kw_only=True)


def declared_pins(model_scan: ModelScan, match: str, dtype: torch.dtype) -> Pins:
    """The fp32 pins that the model's own keywords ask for.

    A pin on any name of a tied tensor pins it.

    Args:
        model_scan: The model's tensors.
        match: "substring" (as NeMo Automodel), "segment" (whole dotted segments), or "hf"
            (transformers' own matcher and rule, which depends on the dtype).
        dtype: The target dtype; only "hf" asks for it.

    Raises:
        ConfigError: Another `match`, or a declaration that is no list of keywords.
    """
    if match not in MATCHES:
        raise ConfigError(f"match={match!r} must be one of {', '.join(map(repr, MATCHES))}.")
    declarations = tuple(_declarations(model_scan, match, dtype))
    by_owner: defaultdict[str, list[Declaration]] = defaultdict(list)
    for declaration in declarations:
        by_owner[declaration.owner].append(declaration)
    reasons: dict[int, str] = {}
    matched: dict[Declaration, list[str]] = {declaration: [] for declaration in declarations}
    for index, item in enumerate(model_scan.tensors if declarations else ()):
        for declaration, relative, name in _hits(item, by_owner, match):
            matched[declaration].append(relative)
            reasons.setdefault(index, _reason(declaration, name, item))
    return Pins(reasons, notes=tuple(dict.fromkeys(_notes(matched, match))))


def _hits(
    item: NamedTensor, by_owner: dict[str, list[Declaration]], match: str
) -> Iterator[tuple[Declaration, str, str]]:
    if match == "hf" and item.kind == NONPERSISTENT_BUFFER:
        return  # no key of a state dict
    for name in item.names:
        for owner in ("", *reversed(tuple(ancestry(name)))):
            for declaration in by_owner.get(owner, ()):
                relative = without_parametrizations(name[len(owner) + 1 :] if owner else name)
                if declaration.hits(relative):
                    yield declaration, relative, name


def _reason(declaration: Declaration, name: str, item: NamedTensor) -> str:
    via = "" if name == item.names[0] else f", by its alias {name!r}"
    return f"fp32 pin: {declaration}{via}"


def _notes(matched: dict[Declaration, list[str]], match: str) -> Iterator[str]:
    for declaration, names in matched.items():
        if not names:
            yield f"{declaration} matched nothing"
        inside = [name for name in names if not has_segments(name, declaration.keyword)]
        if inside and match == "substring":
            yield (
                f"{declaration} matches inside a name segment, as in {inside[0]!r} "
                f"({len(inside)} of {len(names)} names)"
            )


def _declarations(model_scan: ModelScan, match: str, dtype: torch.dtype) -> Iterator[Declaration]:
    for name, _, module in model_scan.modules:
        for source, keywords in _keywords(module, match, dtype):
            for keyword in keywords:
                yield Declaration(
                    keyword, owner=name, source=source, hits=_matcher(keyword, match, source)
                )


def _keywords(
    module: nn.Module, match: str, dtype: torch.dtype
) -> Iterator[tuple[str, Iterable[str]]]:
    if match == "hf" and hasattr(type(module), "_get_dtype_plan"):
        hf_model: Any = module
        plan: dict[str, torch.dtype] = hf_model._get_dtype_plan(dtype)
        source = f"{class_of(module).__name__}._get_dtype_plan"
        yield source, sorted(k for k, v in plan.items() if v == torch.float32)
        return
    for attribute in (STRICT, PLAIN):
        # Not by getattr alone: wrappers pass attributes of what they wrap through.
        if not (attribute in vars(module) or hasattr(type(module), attribute)):
            continue
        source = f"{class_of(module).__name__}.{attribute}"
        keywords = _checked_keywords(getattr(module, attribute), source)
        if match != "hf" or dtype in _HF_DTYPES[attribute]:
            yield source, keywords


def _checked_keywords(value: Any, source: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list | tuple | set | frozenset):
        raise ConfigError(f"{source}={value!r} must be a list, tuple or set of keywords, or None.")
    for keyword in value:  # pyright: ignore[reportUnknownVariableType]
        if not isinstance(keyword, str) or not keyword:
            raise ConfigError(
                f"{source} has the keyword {keyword!r}, which must be a str that is not empty "
                "('' would match every tensor)."
            )
    return tuple(sorted(set(value)))  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]


def _matcher(keyword: str, match: str, source: str) -> Callable[[str], bool]:
    if match == "substring":
        return lambda name: keyword in name
    if match == "segment":
        return lambda name: has_segments(name, keyword)
    search = _hf_pattern(keyword, source).search
    return lambda name: search(name) is not None


def _hf_pattern(keyword: str, source: str) -> re.Pattern[str]:
    try:
        from transformers.core_model_loading import build_glob_alternation
    except ImportError as error:
        raise BackendUnavailableError(
            f"match='hf' needs the matcher of transformers 5 (build_glob_alternation): {error}; "
            "install it, or use match='substring'."
        ) from error
    try:
        return build_glob_alternation([keyword])[0]
    except re.error as error:
        raise ConfigError(
            f"{source} has the keyword {keyword!r}, no expression: {error}."
        ) from None
