"""A small config of any config class of transformers: known fields small, sub-configs likewise."""

import dataclasses

from transformers import AutoConfig

HEADS, HEAD, WIDTH, VOCAB = 2, 8, 16, 64

SMALL = {
    **dict.fromkeys(
        ("num_hidden_layers", "num_layers", "num_decoder_layers", "depth", "encoder_layers"), 2
    ),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "swa_num_attention_heads"), HEADS),
    **dict.fromkeys(("swa_num_key_value_heads", "index_n_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("hidden_size", "d_model", "embed_dim", "ffn_dim", "d_ff", "mlp_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "encoder_ffn_dim", "moe_intermediate_size"), WIDTH),
    **dict.fromkeys(("out_hidden_size", "text_hidden_size", "encoder_hidden_size"), WIDTH),
    **dict.fromkeys(("ffn_hidden_size", "expert_ffn_hidden_size", "image_text_hidden_size"), WIDTH),
    **dict.fromkeys(("shared_expert_intermediate_size", "shared_experts_intermediate_size"), WIDTH),
    **dict.fromkeys(("moe_shared_expert_intermediate_size", "moe_hidden_size"), WIDTH),
    **dict.fromkeys(("dense_intermediate_size", "output_channels", "projection_hidden_dim"), WIDTH),
    **dict.fromkeys(("projector_hidden_size", "projection_intermediate_size"), WIDTH),
    **dict.fromkeys(("head_dim", "d_kv", "v_head_dim", "swa_head_dim", "linear_head_dim"), HEAD),
    **dict.fromkeys(("qk_nope_head_dim", "qk_rope_head_dim"), HEAD),
    **dict.fromkeys(("index_head_dim", "ssm_state_size", "chunk_size"), 2 * HEAD),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank"), 8),
    **dict.fromkeys(("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k", "moe_topk", "zero_expert_num"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("moe_num_shared_experts", "first_k_dense_replace", "num_dense_layers"), 1),
    **dict.fromkeys(("num_query_tokens", "index_topk", "sliding_window", "patch_size"), 4),
    **dict.fromkeys(("sliding_window_size", "num_mel_bins", "n_mel_bins"), 4),
    "image_size": 8,
    "max_position_embeddings": 64,
    "max_source_positions": 8,
    "vocab_size": VOCAB,
    "unpadded_vocab_size": VOCAB,
}
"""Fields of configs by their names; a field whose default is None is left to the config."""

FIRST_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
NESTED = "_config"


def small_config(config_class, overrides=None):
    """A config of the class that makes a model of a few thousand parameters.

    `overrides` are fields of the config; under the name of a sub-config they are fields of that.
    """
    overrides = dict(overrides or {})
    values = _small_fields(config_class)
    for name, sub_class in (config_class.sub_configs or {}).items():
        if sub_class is AutoConfig:
            sub_class = type(getattr(config_class(), name))
        values[name] = small_config(sub_class, overrides.pop(name, None))
    return config_class(**values | overrides)


def _small_fields(config_class):
    values = {}
    for field in dataclasses.fields(config_class):
        default = field.default
        if isinstance(default, int) and not isinstance(default, bool):
            if field.name in SMALL:
                values[field.name] = SMALL[field.name]
            elif field.name.endswith(("_token_id", "_token_index")):
                values[field.name] = _token(field.name, values)
    return values


def _token(name, values):
    if name in FIRST_TOKENS:
        return FIRST_TOKENS.index(name)
    return len(FIRST_TOKENS) + sum(1 for other in values if other.endswith(("_id", "_index")))
