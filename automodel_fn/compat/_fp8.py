"""The original's TEFp8Config: nothing happens, silently, where Transformer Engine is missing."""

from __future__ import annotations

import importlib
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

from automodel_fn.compat._packages import HAVE_TE, LOGGER

_RECIPES = {
    "current": "Float8CurrentScaling",
    "block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}


@dataclass(kw_only=True)
class TEFp8Settings:
    """FP8 by Transformer Engine: a recipe's name, or a recipe of Transformer Engine itself.

    New code takes `automodel_fn.TEFp8Config`, which refuses what cannot run.
    """

    recipe: Literal["current", "block", "mxfp8"] | Any = "current"

    def recipe_where(self, have_te: bool) -> Any:
        """Transformer Engine's recipe; None without it. An unknown name means "current".

        Raises:
            ImportError: Transformer Engine is too old for the recipe.
        """
        if not have_te:
            return None
        if not isinstance(self.recipe, str):
            return self.recipe
        recipes = importlib.import_module("transformer_engine.common.recipe")

        name = _RECIPES.get(self.recipe, _RECIPES["current"])
        found = getattr(recipes, name, None)
        if found is None:
            raise ImportError(
                f"te_fp8.recipe={self.recipe!r} needs transformer_engine.common.recipe.{name}, "
                "which the installed Transformer Engine does not have; install a newer one."
            )
        if self.recipe == "mxfp8":
            LOGGER.warning("te_fp8.recipe='mxfp8' takes Transformer Engine's MXFP8BlockScaling.")
        return found()

    def build_recipe(self) -> Any:
        """Transformer Engine's recipe, or None."""
        return self.recipe_where(HAVE_TE)

    def autocast_where(self, have_te: bool) -> AbstractContextManager[Any]:
        """Transformer Engine's autocast with the recipe; without it a context that does nothing."""
        if not have_te:
            return nullcontext()
        quantization = importlib.import_module("transformer_engine.pytorch.quantization")
        return quantization.autocast(enabled=True, recipe=self.build_recipe())
