"""The FP8 part of a backend: a recipe of Transformer Engine, which is imported when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from difflib import get_close_matches
from functools import partial
from types import ModuleType
from typing import Any

import attrs
import torch

from automodel_fn.backend._availability import Availability, Package
from automodel_fn.backend._needs import TE
from automodel_fn.backend._probe import device
from automodel_fn.errors import BackendUnavailableError, ConfigError

_CLASSES = {
    "current": "Float8CurrentScaling",
    "block": "Float8BlockScaling",
    "mxfp8": "MXFP8BlockScaling",
}
RECIPES = tuple(_CLASSES)
_NEWER = "install a newer one: pip install -U 'transformer-engine[pytorch]'."
# What a recipe says of itself; older versions of Transformer Engine have the first few only.
_METHODS = {
    "delayed": "delayed",
    "mxfp8": "mxfp8",
    "float8_current_scaling": "current",
    "float8_block_scaling": "block",
    "nvfp4": "nvfp4",
    "custom": "custom",
}


def _is_recipe(instance: object, attribute: attrs.Attribute[Any], value: Any) -> None:
    allowed = ", ".join(map(repr, RECIPES))
    if isinstance(value, str):
        if value in RECIPES:
            return
        near = get_close_matches(value.lower(), RECIPES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(
            f"recipe={value!r} must be one of {allowed}, or a recipe of Transformer Engine.{hint}"
        )
    if isinstance(value, type):
        name = value.__name__
        raise ConfigError(f"recipe={name} is a class, not a recipe; call it: recipe={name}().")
    if not any(callable(getattr(value, method, None)) for method in _METHODS):
        raise ConfigError(
            f"recipe={value!r} must be one of {allowed}, or a recipe of Transformer Engine, "
            "as transformer_engine.common.recipe.Float8CurrentScaling()."
        )


@attrs.frozen
class TEFp8Config:
    """FP8 in Transformer Engine's modules: by which recipe.

    Importing and making one does not import Transformer Engine. It is hashable if the recipe is:
    names are, Transformer Engine's own recipes are not. Replaces `TEFp8Config` (NeMo Automodel),
    but never answers with nothing where FP8 cannot run.

    Args:
        recipe: "current" (one scale a tensor, taken from the tensor itself), "block" (one a block
            of 128 or 128 x 128), "mxfp8" (one a 32 values, Blackwell), or a recipe that
            Transformer Engine made, which is used as it is.

    Raises:
        ConfigError: Another name, or no recipe at all.

    Example:
        >>> TEFp8Config("block").kind
        'block'
        >>> TEFp8Config("blok")
        Traceback (most recent call last):
        automodel_fn.errors.ConfigError: recipe='blok' must be one of 'current', 'block', 'mxfp8', \
or a recipe of Transformer Engine. Did you mean 'block'?
    """

    recipe: Any = attrs.field(default="current", validator=_is_recipe)

    @property
    def kind(self) -> str:
        """Which kind of recipe it is, by the recipe's own word: "current", "block", "custom" ..."""
        if isinstance(self.recipe, str):
            return self.recipe
        said = (kind for method, kind in _METHODS.items() if _says(self.recipe, method))
        return next(said, "custom")

    def build_recipe(self) -> Any:
        """Transformer Engine's recipe object; one that was given is returned as it is.

        Raises:
            BackendUnavailableError: Transformer Engine is not installed, cannot be imported, or is
                too old to have the recipe.
        """
        if not isinstance(self.recipe, str):
            return self.recipe
        module = _import("transformer_engine.common.recipe", self)
        name = _CLASSES[self.recipe]
        made = getattr(module, name, None)
        if made is None:
            version = _version(_import("transformer_engine", self))
            reason = _found(version).verdict(f"te_fp8={self.kind}").reason
            raise BackendUnavailableError(
                f"recipe={self.recipe!r} needs {name}, which Transformer Engine {version} does not "
                f"have ({reason}); {_NEWER}"
            )
        return made()

    def autocast(self) -> AbstractContextManager[Any]:
        """Transformer Engine's autocast with this recipe; enter it around the forward.

        Enter a new one each time, as with Transformer Engine's own.

        Raises:
            BackendUnavailableError: It cannot run here: no Transformer Engine, one that is too old,
                no GPU, or one that lacks the recipe; raised at the call, before anything is
                entered. The message says which recipes can run.
        """
        return self.prepared()()

    def prepared(self) -> Callable[[], AbstractContextManager[Any]]:
        """What gives a new `autocast()` at each call, all of it checked once.

        Raises:
            BackendUnavailableError: As `autocast`.
        """
        found = _found(_version(_import("transformer_engine", self)))
        recipe = self.build_recipe()
        verdict = found.verdict(f"te_fp8={self.kind}")
        if not verdict.can_run:
            raise BackendUnavailableError(
                f"recipe={_text(self)} cannot run here: {verdict.reason}; {_instead(found)}"
            )
        autocast = _attribute("transformer_engine.pytorch.quantization", "autocast")
        if autocast is not None:
            return partial(autocast, enabled=True, recipe=recipe)
        fp8_autocast = _attribute("transformer_engine.pytorch", "fp8_autocast")
        if fp8_autocast is not None:
            return partial(fp8_autocast, enabled=True, fp8_recipe=recipe)
        raise BackendUnavailableError(
            "Transformer Engine has neither pytorch.quantization.autocast nor "
            f"pytorch.fp8_autocast; {_NEWER}"
        )


def _says(recipe: Any, method: str) -> bool:
    asked = getattr(recipe, method, None)
    return callable(asked) and bool(asked())


def _text(config: TEFp8Config) -> str:
    return repr(config.recipe) if isinstance(config.recipe, str) else type(config.recipe).__name__


def _instead(found: Availability) -> str:
    can = [name for name in RECIPES if found.verdict(f"te_fp8={name}").can_run]
    if can:
        return f"recipes that can: {', '.join(map(repr, can))}."
    return "none of the recipes can, so leave FP8 off (te_fp8=None)."


def _version(engine: ModuleType) -> str:
    return getattr(engine, "__version__", "unknown")


def _import(name: str, config: TEFp8Config) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "transformer_engine":
            raise _broken(config, error) from error
        raise BackendUnavailableError(
            f"recipe={_text(config)} needs Transformer Engine, which is not installed "
            f"({error.name}); run pip install 'transformer-engine[pytorch]' on a machine with a "
            "CUDA GPU, or leave FP8 off (te_fp8=None)."
        ) from error
    # It loads CUDA libraries as it is imported, and says in many ways that one is missing.
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise _broken(config, error) from error


def _broken(config: TEFp8Config, error: BaseException) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"recipe={_text(config)} needs Transformer Engine, which cannot be imported "
        f"({type(error).__name__}: {error}); repair it, or leave FP8 off (te_fp8=None)."
    )


def _attribute(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        return None


def _found(version: str) -> Availability:
    """What there is for FP8: cheap enough for every step, and of the GPU in use, not the best."""
    devices = (device(torch.cuda.current_device()),) if torch.cuda.is_available() else ()
    return Availability(
        python="",
        torch=torch.__version__,
        cuda=torch.version.cuda,
        devices=devices,
        packages=(Package(TE, version=version),),
    )
