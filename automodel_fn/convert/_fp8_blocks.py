"""FP8 around forwards: of the model, and of what a recompute runs on its own."""

from __future__ import annotations

from functools import wraps
from typing import Any

from automodel_fn.backend._fp8 import TEFp8Config
from automodel_fn.convert._around import Around
from automodel_fn.convert._parts import Part
from automodel_fn.convert._rules import Rule
from automodel_fn.convert._settings import Behaviour, Namespace


def _namespace(below: type[Any], choice: str) -> Namespace:
    autocast = TEFp8Config(choice).prepared()

    @wraps(below.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        with autocast():
            return below.forward(self, *args, **kwargs)

    return {"forward": forward}


def _is_block(part: Part, around: Around) -> bool:
    return id(part.module) in around.fp8_blocks


TE_FP8 = Behaviour(_namespace)
TE_FP8_RULE = Rule(
    "te_fp8",
    own="none",
    is_candidate=_is_block,
    reason="as asked, around its forward, so that a recompute of it runs in FP8 too",
)
