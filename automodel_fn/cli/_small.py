"""Model types of transformers, shrunken to a few million parameters."""

from __future__ import annotations

from typing import Any

from automodel_fn.errors import ConfigError

VOCABULARY = 256

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
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
    "vocab_size_per_layer_input": VOCABULARY,
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
_SMALL_DEEPSEEK: dict[str, Any] = {
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
}
_SMALL_BY_TYPE: dict[str, dict[str, Any]] = {
    "deepseek_v2": _SMALL_DEEPSEEK,
    "deepseek_v3": _SMALL_DEEPSEEK,
    "gpt_oss": {"max_position_embeddings": 131072},  # which its YaRN factor is made for
    "mamba2": {"num_heads": 8},
}


def small_config(model_type: str, config: Any) -> Any:
    """A config like that one, shrunken to a few million parameters.

    Raises:
        ConfigError: The type refuses the small sizes.
    """
    known = config.to_dict()
    sizes = _SMALL | _SMALL_BY_TYPE.get(model_type, {})
    wanted = {name: value for name, value in sizes.items() if name in known}
    layers = known.get("layer_types")
    if isinstance(layers, list) and "num_hidden_layers" in wanted:
        wanted["layer_types"] = layers[: wanted["num_hidden_layers"]]
    try:
        return type(config)(**wanted)
    except Exception as error:
        raise ConfigError(
            f"model={model_type!r} could not be shrunken ({one_line(error)}); "
            "give a folder with a small checkpoint instead."
        ) from error


def one_line(error: Exception) -> str:
    """An error of another library as one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"
