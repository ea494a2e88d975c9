"""Import Transformer Engine, or say why it cannot be."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from automodel_fn.errors import BackendUnavailableError
from automodel_fn.te._classes import TEClasses

_MODULE = "transformer_engine.pytorch"
_NAMES = {
    "linear": "Linear",
    "grouped_linear": "GroupedLinear",
    "layer_norm_linear": "LayerNormLinear",
    "layer_norm_mlp": "LayerNormMLP",
    "multihead_attention": "MultiheadAttention",
    "transformer_layer": "TransformerLayer",
    "rms_norm": "RMSNorm",
    "layer_norm": "LayerNorm",
}


def load_te_classes() -> TEClasses:
    """The classes of the installed Transformer Engine, which is imported now if it was not yet.

    Raises:
        BackendUnavailableError: It is not installed, cannot be imported, or is too old.
    """
    module = load_te_module()
    missing = [name for name in _NAMES.values() if not hasattr(module, name)]
    if missing:
        raise BackendUnavailableError(
            f"{_MODULE} has no {', '.join(missing)}; expected Transformer Engine 2.0 or newer: "
            "pip install --upgrade 'transformer-engine[pytorch]>=2.0'."
        )
    return TEClasses(**{field: getattr(module, name) for field, name in _NAMES.items()})


def recipe_reader() -> Callable[[], object]:
    """What gives the FP8 recipe in force, and None where FP8 is off.

    Of the Transformer Engine that is imported; without one it gives a word that never changes.
    """
    for name in ("quantization", "fp8"):
        manager = getattr(sys.modules.get(f"{_MODULE}.{name}"), "FP8GlobalStateManager", None)
        if manager is not None:
            return _recipes(manager)
    return lambda: "unknown"


def _recipes(manager: Any) -> Callable[[], object]:
    """Gives equal recipes as one object, so that asking for a change is mostly asking who it is.

    A program that makes a recipe for each autocast would otherwise have every module compare them.
    """
    seen: object = None
    given: object = None

    def read() -> object:
        nonlocal seen, given
        # The state and not its methods, where there is one: every forward asks.
        state = getattr(manager, "quantization_state", None)
        if state is None:
            enabled, recipe = manager.is_fp8_enabled(), manager.get_fp8_recipe()
        else:
            enabled, recipe = state.fp8_enabled, state.fp8_recipe or "default"
        if not enabled:
            return None
        if recipe is not seen:
            if type(recipe) is not type(given) or recipe != given:
                given = recipe
            seen = recipe
        return given

    return read


def load_te_module() -> Any:
    """`transformer_engine.pytorch`, which is imported now if it was not yet.

    Raises:
        BackendUnavailableError: It is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(_MODULE)
    # What its shared libraries raise varies: a missing file, an undefined symbol, no driver.
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and _is_its_own(error.name):
            raise BackendUnavailableError(
                f"{_MODULE} cannot be imported ({error}); Transformer Engine needs a CUDA GPU and "
                "pip install --no-build-isolation 'transformer-engine[pytorch]'."
            ) from error
        said = f"{type(error).__name__}: {error}".rstrip(". ")
        raise BackendUnavailableError(
            f"Transformer Engine is installed, but {_MODULE} cannot be imported: {said}. "
            "Its extension must be built for this PyTorch and Python; where a symbol of cuDNN is "
            "undefined, put the folder of torch's own cuDNN first on LD_LIBRARY_PATH."
        ) from error


def _is_its_own(module: str | None) -> bool:
    return (module or _MODULE).partition(".")[0] == "transformer_engine"
