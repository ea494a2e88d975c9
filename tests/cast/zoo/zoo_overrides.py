"""Where the general rule of zoo_shrink does not do: fields of the configs, family by family."""

SPARSE = ["dense", "sparse"]
ATOMS = {"hidden_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1, "output_dim": 16}
FLOW = {"flow_head_config": {"condition_dim": 16, "latent_dim": 4, "frequency_embedding_size": 8}}
OCR = {
    "text_config": {"mlp_layer_types": SPARSE, "head_dim": None, "num_experts_per_tok": 2},
    "vision_config": {
        "sam_config": {"downsample_channels": [16, 16], "global_attn_indexes": [1]},
        "encoder_config": {"layer_types": None},
    },
}

TEXT_QFORMER = {"image_token_index": 4, "qformer_config": {"use_qformer_text_input": True}}

OVERRIDES = {
    "apertus1p5": {
        "text_config": {"vocab_size": 96},
        "vision_config": {
            "codebook_size": 16,
            "embed_dim": 8,
            "latent_channels": 8,
            "base_channels": 32,
            "channel_multiplier": (1, 1),
            "num_res_blocks": 1,
            "resolution": 8,
        },
        "audio_config": {
            "codebook_size": 16,
            "codebook_dim": 16,
            "num_filters": 2,
            "upsampling_ratios": (2, 2),
            "decoder_hidden_size": 32,
            "decoder_num_layers": 1,
            "num_lstm_layers": 1,
        },
        "image_token_offset": 64,
        "audio_token_offset": 80,
    },
    "bailing_hybrid": {"layer_group_size": 2},
    "beam": {"mlp_layer_types": SPARSE},
    "deepseek_v4": {
        "num_hidden_layers": 3,
        "layer_types": [
            "compressed_sparse_attention",
            "heavily_compressed_attention",
            "sliding_attention",
        ],
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "compress_rates": {"compressed_sparse_attention": 2, "heavily_compressed_attention": 4},
        "o_groups": 2,
    },
    "blip_2": {"image_token_index": 4},
    "blip_2.Blip2TextModelWithProjection": TEXT_QFORMER,
    "blip_2.Blip2ForImageTextRetrieval": TEXT_QFORMER,
    "deepseek_ocr2": OCR,
    "deepseek_v2": {"num_experts_per_tok": 2},
    "unlimited_ocr": OCR,
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {
        "text_config": {"head_dim": 16, "index_head_dim": 16},
        "vision_config": {
            "pyramid_num_routed": [-1, 4],
            "adapter_in_dim": 16,
            "adapter_out_dim": 16,
        },
        "audio_config": {
            "adapter_input_size": 16,
            "adapter_out_dim": 16,
            "feature_size": 8,
            "downsample_hidden_size": 8,
        },
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            "moe_intermediate_size": [16, 16],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [1, 1, 2],
            },
        }
    },
    "esmfold2": {
        "atom_encoder": ATOMS,
        "structure_head": {
            "diffusion_module": {
                "atom_encoder": ATOMS,
                "fourier_dim": 8,
                "pair_intermediate_size": 8,
            },
            "num_distogram_bins": 8,
            "num_diffusion_samples": 1,
            "inference_num_steps": 2,
        },
        "confidence_head": {
            "num_plddt_bins": 4,
            "num_pde_bins": 4,
            "num_pae_bins": 4,
            "distogram_bins": 8,
        },
        "msa_encoder": {"outer_hidden_size": 4},
        "single_inputs_size": 83,
        "pairwise_hidden_size": 16,
        "pair_transition_intermediate_size": 16,
        "max_atomic_number": 8,
        "char_vocab_size": 4,
        "folding_trunk_num_hidden_layers": 1,
        "parcae_num_coda_layers": 1,
        "num_loops": 1,
    },
    "flint": {"mlp_only_layers": [0]},
    "glm4v_moe": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 1.0,
                "mrope_section": [2, 1, 1],
            }
        }
    },
    "glm5_next": {
        "text_config": {
            "num_hidden_layers": 4,
            "index_kpool": 2,
            "qk_rope_head_dim": 0,
            "head_dim": 0,
        }
    },
    "gradium_phonon_tts": FLOW | {"latent_dim": 4, "audio_prompt_dim": 8},
    "pocket_tts": FLOW | {"latent_dim": 4},
    "granite_speech5": {"encoder_config": {"context_size": 8}},
    "hy_v4_vl": {
        "text_config": {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [2, 1, 1],
            }
        },
        "vision_config": {"max_image_size": 16},
    },
    "inkling": {
        "vision_config": {"num_hidden_layers": 4, "num_channels": 1, "patch_size": 2},
        "audio_config": {"mel_vocab_size": 8},
    },
    "inkling2": {"text_config": {"n_layers_per_attn_res_block": 1}},
    "inkling2_loop": {
        "text_config": {
            "num_hidden_layers": 3,
            "n_layers_per_attn_res_block": 1,
            "loop_layer_index_start": 1,
            "loop_layer_index_end": 2,
            "loop_num_passes": 2,
            "loop_gate_rank": 4,
        }
    },
    "instructblip": {"image_token_index": 4},
    "instructblipvideo": {"video_token_index": 4},
    "kimi_linear": {"layer_types": ["linear_attention", "full_attention"]},
    "kyutai_speech_to_text": {
        "codec_config": {
            "num_filters": 4,
            "upsampling_ratios": [2, 2],
            "codebook_dim": 8,
            "codebook_size": 16,
            "num_quantizers": 2,
            "vector_quantization_hidden_dimension": 8,
            "upsample_groups": 16,
        },
        "codebook_vocab_size": 16,
        "num_codebooks": 2,
    },
    "mimo_v2_flash": {
        "num_key_value_heads": 1,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
            for kind in ("full_attention", "sliding_attention")
        },
    },
    "muse_spark": {
        "audio_config": {
            "num_hidden_layers": 2,
            "patch_sizes": (4, 2),
            "hidden_sizes": (8, 16),
            "depths": (1, 1),
        }
    },
    "nemotron3_5_transcribe": {
        "audio_config": {"diarization_config": {"head_config": {"audio_hidden_size": 16}}},
        "text_config": {
            "hybrid_override_pattern": "ME*",
            "mamba_num_heads": 2,
            "mamba_head_dim": 8,
            "n_groups": 1,
        },
        "word_timestamp_config": {"blank_token_id": 63},
    },
    "nemotron_h": {
        "hybrid_override_pattern": "ME*",
        "mamba_num_heads": 2,
        "mamba_head_dim": 8,
        "n_groups": 1,
    },
    "voxtral": {"audio_token_id": 4},
    "slanext": {
        "post_conv_in_channels": 16,
        "post_conv_out_channels": 16,
        "max_text_length": 4,
        "vision_config": {"global_attn_indexes": (1,), "window_size": 2},
    },
}
