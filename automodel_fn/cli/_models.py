"""Where the model comes from: the built-in one, a checkpoint folder, or a shrunken model type."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from automodel_fn.cast._apply import apply_cast_plan
from automodel_fn.cast._planners import cast_plan
from automodel_fn.errors import ConfigError

BUILT_IN = "deepseek_v3"
_VOCABULARY = 256

_SMALL: dict[str, Any] = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 192,
    "n_embd": 192,
    "d_model": 192,
    "intermediate_size": 512,
    "ffn_dim": 512,
    "d_ff": 512,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_hidden_layers": 4,
    "n_layer": 4,
    "num_layers": 4,
    "num_attention_heads": 4,
    "n_head": 4,
    "num_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": _VOCABULARY,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "n_positions": 2048,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
_SMALL_BY_TYPE: dict[str, dict[str, Any]] = {
    "deepseek_v3": {
        "num_key_value_heads": 4,
        "n_shared_experts": 1,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
        "head_dim": 16,
    },
}


def small_config(model_type: str) -> Any:
    """A transformers config of that type, shrunken to a few million parameters.

    Raises:
        ConfigError: transformers knows no causal LM of that type.
    """
    config = default_config(model_type)
    known = config.to_dict()
    sizes = _SMALL | _SMALL_BY_TYPE.get(model_type, {})
    wanted = {name: value for name, value in sizes.items() if name in known}
    layers = known.get("layer_types")
    if isinstance(layers, list) and "num_hidden_layers" in wanted:
        wanted["layer_types"] = [*layers][: wanted["num_hidden_layers"]]
    try:
        return type(config)(**wanted)
    except Exception as error:
        raise ConfigError(
            f"model={model_type!r} could not be shrunken ({_first_line(error)}); "
            "give a folder with a small checkpoint instead."
        ) from error


def default_config(model_type: str) -> Any:
    """The transformers config of that type, with its default sizes.

    Raises:
        ConfigError: transformers knows no causal LM of that type.
    """
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if model_type not in KNOWN:
        import difflib

        near = difflib.get_close_matches(model_type, KNOWN, n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ConfigError(
            f"model={model_type!r} is neither a folder with a checkpoint nor a model type of which "
            f"transformers has a causal LM{hint}."
        )
    return AutoConfig.for_model(model_type)


def build_model(source: str | None) -> tuple[nn.Module, bool]:
    """The model to train, and whether its weights are fresh.

    Raises:
        ConfigError: No such folder or type, no causal LM, or a vocabulary too small for bytes.
    """
    _quieten()
    is_fresh = source is None or not is_folder(source)
    if is_fresh:
        model = _from_config(small_config(source or BUILT_IN), source or BUILT_IN)
    else:
        model = _load(Path(str(source)))
    found: Any = model
    size = found.get_input_embeddings().weight.shape[0]
    if size < _VOCABULARY:
        raise ConfigError(f"model has a vocabulary of {size}; text read as bytes needs 256.")
    if not torch.cuda.is_available() and hasattr(found, "set_experts_implementation"):
        found.set_experts_implementation("eager")  # the others are made for GPUs, and slow on a CPU
    return model, is_fresh


def reload_model(folder: Path) -> nn.Module:
    """A saved model in float32, which holds every value of the narrower dtypes exactly."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)


def _quieten() -> None:
    """No progress bars of transformers beside ours."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def meta_model(source: str | None) -> nn.Module:
    """The model without memory for its weights, with the dtypes that loading would give it.

    Of a folder it is the model of its config, of a type the one of its default sizes.
    """
    if source is not None and is_folder(source):
        config = _config_of(Path(source))
        stored = config.dtype
    else:
        config, stored = default_config(source or BUILT_IN), None
    with torch.device("meta"):
        model = _from_config(config, str(source))
    if stored in (torch.bfloat16, torch.float16):
        apply_cast_plan(cast_plan(model, stored, match="hf"))
    return model


def is_folder(source: str) -> bool:
    """Whether `source` means a folder: it is one, or it is spelt like one.

    Raises:
        ConfigError: It is spelt like one and does not exist.
    """
    path = Path(source)
    if path.is_dir():
        return True
    if path.exists() or "/" in source or source.startswith("."):
        raise ConfigError(f"model={source!r} is no folder; give a folder with a checkpoint.")
    return False


def _load(folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    _config_of(folder)
    try:
        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", local_files_only=True)
    except Exception as error:
        raise ConfigError(
            f"model={str(folder)!r} could not be loaded as a causal LM: {_first_line(error)}"
        ) from error


def _config_of(folder: Path) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    if not (folder / "config.json").is_file():
        raise ConfigError(f"model={str(folder)!r} has no config.json; give a checkpoint folder.")
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise ConfigError(
            f"model={str(folder)!r} has a config.json that transformers cannot read: "
            f"{_first_line(error)}"
        ) from error
    if config.model_type not in KNOWN:
        raise ConfigError(
            f"model={str(folder)!r} is of type {config.model_type!r}, of which transformers has no "
            "causal LM."
        )
    return config


def _from_config(config: Any, name: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except Exception as error:
        raise ConfigError(f"model={name!r} could not be built: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"
