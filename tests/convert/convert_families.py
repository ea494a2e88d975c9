"""Small models of the families whose backends are tested, each as transformers makes it."""

import torch
import transformers

from automodel_fn import BackendConfig

OWN = BackendConfig(
    attn="sdpa",
    linear="torch",
    rms_norm="torch",
    rope_fusion=False,
    async_masks=False,
    swiglu="torch",
    loss="torch",
)
"""What these models run by of themselves."""

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
DENSE = {**COMMON, "intermediate_size": 48}
MOE = {**DENSE, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 1,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
DEEPSEEK = {
    **MOE,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 24,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}
CONFIGS = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", DENSE),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {**DENSE, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**MOE, "num_experts": 4}),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", {**MOE, "num_local_experts": 4}),
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**DENSE, "sliding_window": 8}),
    "gpt_oss": (
        "GptOssForCausalLM",
        "GptOssConfig",
        {**MOE, "num_local_experts": 4, "sliding_window": 8},
    ),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", DEEPSEEK),
    "qwen3_vl": (
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLConfig",
        {
            "text_config": {
                **DENSE,
                "rope_parameters": {
                    "rope_type": "default",
                    "rope_theta": 10000.0,
                    "mrope_section": [4, 2, 2],
                },
            },
            "vision_config": VISION,
            "image_token_id": 90,
            "video_token_id": 91,
            "vision_start_token_id": 92,
            "vision_end_token_id": 93,
        },
    ),
}
FAMILIES = tuple(CONFIGS)
IMAGE_TOKENS = 4


def small_model(family, seed=0, dtype=torch.float32, **options):
    """A model with random weights, also where transformers makes zeros or ones."""
    model_name, config_name, settings = CONFIGS[family]
    config = getattr(transformers, config_name)(**{**settings, **options})
    torch.manual_seed(seed)
    model = getattr(transformers, model_name)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 or "experts" in name or "gate.weight" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.to(dtype).train()


def batch_of(family, seed=0, length=16):
    """What a forward of the family takes, with labels."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 80, (2, length), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if family == "qwen3_vl":
        ids[:, 1:6] = torch.tensor([92, *[90] * IMAGE_TOKENS])
        pixels = torch.randn(2 * 16, 3 * 4 * 4, generator=generator)
        batch |= {
            "pixel_values": pixels,
            "image_grid_thw": torch.tensor([[1, 4, 4]] * 2),
            "mm_token_type_ids": (ids == 90).long(),
        }
    return {**batch, "labels": ids.masked_fill(ids >= 90, -100)}


def experts_of(model):
    return [module for module in model.modules() if hasattr(module, "has_gate")]


def loss_logits_and_gradients(model, batch):
    found = model(**batch)
    found.loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found.loss, found.logits, gradients


def assert_close(found, expected, tolerance):
    assert found.dtype == expected.dtype
    scale = expected.double().abs().max().clamp_min(1e-12)
    assert ((found.double() - expected.double()).abs().max() / scale).item() < tolerance
