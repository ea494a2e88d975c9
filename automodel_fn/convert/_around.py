"""What a rule may look at beside the module that it decides about."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import attrs
from torch import nn

from automodel_fn.cast._tensors import ModelScan
from automodel_fn.convert._parts import Part, is_experts
from automodel_fn.fqn import ancestry


@attrs.frozen(eq=False)
class Around:
    """A model, and what is asked of it.

    Args:
        parts: Every module of the model.
        asked: The choice for each field, as text.
        chosen: The fields whose choice was left to "auto".
        skipped: By the id of each module that is to be left alone, by which pattern.
        by_name: Every module by every name.
        names_of: By the id of each parameter, all of its names.
        head: The head of a model of transformers, or None.
        fp8_blocks: The ids of the modules that FP8 is on in, each on its own.
        has_gpu: Whether it is to run on a GPU.
    """

    parts: Sequence[Part]
    asked: Mapping[str, str] = attrs.field(kw_only=True)
    chosen: Collection[str] = attrs.field(kw_only=True)
    skipped: Mapping[int, str] = attrs.field(kw_only=True)
    by_name: Mapping[str, Part] = attrs.field(kw_only=True)
    names_of: Mapping[int, tuple[str, ...]] = attrs.field(kw_only=True)
    head: nn.Module | None = attrs.field(kw_only=True)
    fp8_blocks: frozenset[int] = attrs.field(kw_only=True)
    has_gpu: bool = attrs.field(default=False, kw_only=True)

    def as_asked(self, field: str) -> str:
        """By whom the choice for a field was made, in words."""
        return "as 'auto' chose" if field in self.chosen else "as asked"

    def above(self, part: Part) -> Iterator[Part]:
        """The part, then what is around it, innermost first."""
        return _above(part, self.by_name)


def look_around(
    parts: Sequence[Part],
    tensors: ModelScan,
    asked: Mapping[str, str],
    *,
    chosen: Collection[str] = (),
    skipped: Mapping[int, str] | None = None,
    has_gpu: bool = False,
) -> Around:
    """All that rules look at, found once."""
    by_name = {name: part for part in parts for name in part.names}
    head = _output_head(parts[0].module)
    return Around(
        parts,
        asked=asked,
        chosen=chosen,
        skipped=skipped or {},
        by_name=by_name,
        names_of={id(item.tensor): item.names for item in tensors.tensors},
        head=head,
        fp8_blocks=frozenset(_fp8_blocks(parts, by_name, asked, head)),
        has_gpu=has_gpu,
    )


def _above(part: Part, by_name: Mapping[str, Part]) -> Iterator[Part]:
    return (by_name[name] for name in (*ancestry(part.names[0]), ""))


def _output_head(model: nn.Module) -> nn.Module | None:
    asked: Any = getattr(model, "get_output_embeddings", None)
    found: Any = asked() if callable(asked) else None
    return found


def _fp8_blocks(
    parts: Sequence[Part],
    by_name: Mapping[str, Part],
    asked: Mapping[str, str],
    head: nn.Module | None,
) -> Iterator[int]:
    """What activation checkpointing recomputes as a whole, where it has a layer that FP8 acts on.

    A recompute runs in the backward, where whatever was entered around the model is left.
    """
    for part in parts:
        if _is_te(part, asked) and part.module is not head:
            around = (each for each in _above(part, by_name) if _is_recomputed(each))
            yield id(next(around, part).module)
            yield id(parts[0].module)


def _is_te(part: Part, asked: Mapping[str, str]) -> bool:
    is_linear = asked.get("linear") == "te" and issubclass(part.own, nn.Linear)
    are_experts = asked.get("grouped_experts") == "te" and is_experts(part)
    return is_linear or are_experts or "te" in map(part.settings.get, ("linear", "grouped_experts"))


def _is_recomputed(part: Part) -> bool:
    return any(cls.__name__ == "GradientCheckpointingLayer" for cls in part.own.__mro__)
