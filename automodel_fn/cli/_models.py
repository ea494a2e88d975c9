"""Where the model comes from: the built-in one, a checkpoint folder, or a shrunken model type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from automodel_fn.cast._apply import apply_cast_plan
from automodel_fn.cast._planners import cast_plan
from automodel_fn.cli._configs import (
    BUILT_IN,
    default_config,
    folder_config,
    is_folder,
    quiet_transformers,
)
from automodel_fn.cli._small import VOCABULARY, one_line, small_config
from automodel_fn.errors import ConfigError

_MAX_SMALL = 100_000_000


def build_model(source: str | None) -> tuple[nn.Module, bool]:
    """The model to train, and whether its weights are fresh.

    Raises:
        ConfigError: No such folder or type, no causal LM, or a vocabulary too small for bytes.
    """
    is_fresh = source is None or not is_folder(source)
    with quiet_transformers():
        model: Any = _small_model(source or BUILT_IN) if is_fresh else _load(Path(str(source)))
    size = model.get_input_embeddings().weight.shape[0]
    if size < VOCABULARY:
        raise ConfigError(f"model has a vocabulary of {size}; text read as bytes needs 256.")
    if not torch.cuda.is_available() and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the others are made for GPUs, and slow on a CPU
    if getattr(model, "loss_type", "") is None:
        model.loss_type = "ForCausalLM"  # what transformers takes then, with a warning
    return model, is_fresh


def _small_model(model_type: str) -> nn.Module:
    config = small_config(model_type, default_config(model_type))
    with torch.device("meta"):
        size = sum(p.numel() for p in _from_config(config, model_type).parameters())
    if size > _MAX_SMALL:
        raise ConfigError(
            f"model={model_type!r} could not be shrunken: it has {size / 1e6:,.0f} M parameters "
            "with the small sizes; give a folder with a small checkpoint instead."
        )
    return _from_config(config, model_type)


def check_length(model: nn.Module, seq_len: int) -> None:
    """See that the model has as many positions.

    Raises:
        ConfigError: It has fewer.
    """
    config: Any = model.config
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < seq_len:
        raise ConfigError(f"seq_len={seq_len} must be at most {most}, the model's positions.")


def recompute(model: Any) -> None:
    """Have the model's layers run again in the backward, instead of keeping what they made.

    Raises:
        ConfigError: It has no layers that can be recomputed.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigError(
            f"activation_checkpointing=True cannot be met: {type(model).__name__} has no layers "
            "that can be recomputed."
        )
    enable = getattr(model, "activation_checkpointing_enable", None)
    if enable is None:  # its name in older releases of transformers
        enable = model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


def reload_model(folder: Path) -> nn.Module:
    """A saved model in float32, which holds every value of the narrower dtypes exactly."""
    from transformers import AutoModelForCausalLM

    with quiet_transformers():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, local_files_only=True
        )


def meta_model(source: str | None) -> nn.Module:
    """The model without memory for its weights, with the dtypes that loading would give it.

    Of a folder it is the model of its config, of a type the one of its default sizes.
    """
    if source is not None and is_folder(source):
        config = folder_config(Path(source))
        stored = config.dtype
    else:
        config, stored = default_config(source or BUILT_IN), None
    with torch.device("meta"), quiet_transformers():
        model = _from_config(config, str(source))
    if stored in (torch.bfloat16, torch.float16):
        apply_cast_plan(cast_plan(model, stored, match="hf"))
    return model


def _load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    folder_config(folder)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    except Exception as error:
        raise ConfigError(
            f"model={str(folder)!r} could not be loaded as a causal LM: {one_line(error)}"
        ) from error


def _from_config(config: Any, name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise ConfigError(f"model={name!r} could not be built: {one_line(error)}") from error
