"""Law of notes: a plan says what of its pins deserves attention, and nothing else of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from automodel_fn.cast._planners import cast_plan
from automodel_fn.testing._expected import expected_cast
from automodel_fn.testing._facts import demand
from automodel_fn.testing._oracle import KEEP, Case, Path, without_parametrizations

_NOTHING, _INSIDE = " matched nothing", " matches inside a name segment"


def check_notes(
    model: nn.Module, dtype: torch.dtype, *, match: str = "substring", **plan_options: Any
) -> None:
    """Law: a plan notes each keyword that matches nothing or inside a name segment, and no other.

    It also notes, with their number, the fp32 pins whose low bits are gone already.

    Args:
        model: A model; it is not changed.
        dtype: The target dtype.
        match: "substring" or "segment", as for `cast_plan`.
        plan_options: Further options of `cast_plan`.

    Raises:
        AssertionError: It does not hold.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> model._keep_in_fp32_modules = ["bia", "norm"]
        >>> check_notes(model, torch.bfloat16)
    """
    notes = cast_plan(model, dtype, match=match, **plan_options).notes
    cases = expected_cast(model, dtype, match=match, **plan_options)
    wanted: dict[str, set[str]] = {_NOTHING: set(), _INSIDE: set()}
    for declared, keyword, names in _declared(model, cases):
        hits = [name for name in names if _hits(keyword, name, match)]
        if not hits:
            wanted[_NOTHING].add(declared)
        elif any(not _hits(keyword, name, "segment") for name in hits):
            wanted[_INSIDE].add(declared)
    for text, declarations in wanted.items():
        noted = {note.partition(text)[0] for note in notes if text in note}
        demand(noted == declarations, f"{text!r} must be noted of {declarations}, not of {noted}")
    narrow = [c for c in cases if c.weight == KEEP and c.tensor.dtype != torch.float32]
    head = f"{len(narrow)} fp32 pins are stored in less"
    noted = [note for note in notes if "stored in less" in note]
    demand(len(noted) == bool(narrow), f"{len(narrow)} pins have lost bits, noted is {noted}")
    demand(all(note.startswith(head) for note in noted), f"{head} must be noted, not {noted}")


def _hits(keyword: str, name: str, match: str) -> bool:
    return keyword in name if match == "substring" else f".{keyword}." in f".{name}."


def _declared(model: nn.Module, cases: list[Case]) -> Iterator[tuple[str, str, set[str]]]:
    """Each keyword with what declares it, in words, and the names in the subtree that it is for."""
    paths = [path for case in cases for path in case.paths]
    merged: dict[tuple[str, str], set[str]] = {}
    for place in _places(model, (model,), ()):
        depth = len(place.keys) - 1
        owner = place.name().rpartition(".")[0]
        at = f" (at {owner})" if owner else ""
        names = {
            without_parametrizations(path.name(depth))
            for path in paths
            if path.keys[:depth] == place.keys[:depth]
        }
        module = place.owner
        for attribute in ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"):
            if attribute in vars(module) or hasattr(type(module), attribute):
                for keyword in getattr(module, attribute) or ():
                    source = f"{type(module).__name__}.{attribute}"
                    declared = f"keyword {keyword!r} of {source}{at}"
                    merged.setdefault((declared, keyword), set()).update(names)
    for (declared, keyword), names in merged.items():
        yield declared, keyword, names


def _places(
    module: nn.Module, modules: tuple[nn.Module, ...], keys: tuple[str, ...]
) -> Iterator[Path]:
    yield Path(modules, (*keys, "tensor"))
    for key, child in module._modules.items():
        if child is not None:
            yield from _places(child, (*modules, child), (*keys, key))
