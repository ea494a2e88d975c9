from __future__ import annotations

import pytest
from torch import nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV3PreTrainedModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from automodel_fn import bf16, cast_plan, fp16

PLAIN, STRICT = "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"


def declaring(keywords, attribute=PLAIN, **children):
    model = nn.ModuleDict(children or {"mlp": nn.Linear(2, 2), "norm": nn.LayerNorm(2)})
    setattr(model, attribute, keywords)
    return model


def pinned(model, dtype=bf16, **arguments):
    entries = cast_plan(model, dtype, **arguments).entries
    return {name for entry in entries for name in entry.names if entry.action == "keep"}


NORM = {"norm.weight", "norm.bias"}


@pytest.mark.parametrize(("dtype", "names"), [(bf16, set()), (fp16, NORM)])
def test_plain_keywords_count_for_fp16_alone_by_the_rule_of_transformers(dtype, names):
    assert pinned(declaring(["norm"]), dtype, match="hf") == names


@pytest.mark.parametrize("dtype", [bf16, fp16])
def test_strict_keywords_count_for_both_by_the_rule_of_transformers(dtype):
    assert pinned(declaring(["norm"], STRICT), dtype, match="hf") == NORM


def test_the_matcher_of_transformers_takes_globs():
    model = declaring(
        ["blocks*norm"], STRICT, blocks=nn.ModuleList([nn.ModuleDict({"norm": nn.LayerNorm(2)})])
    )

    assert pinned(model, match="hf") == {"blocks.0.norm.weight", "blocks.0.norm.bias"}
    assert pinned(model, match="substring") == set()


def test_the_matcher_of_transformers_passes_buffers_over_that_are_in_no_checkpoint(zoo):
    zoo._keep_in_fp32_modules_strict = ["inv_freq", "table"]

    names = pinned(zoo, match="hf", buffers="all")

    assert "blocks.0.table" in names
    assert "blocks.0.inv_freq" not in names


def test_llama_declares_no_pins():
    config = LlamaConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, vocab_size=9
    )

    assert pinned(LlamaForCausalLM(config)) == set()


def test_t5_pins_the_second_dense_by_our_rule_and_for_bf16_not_by_transformers_own():
    config = T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=9)
    model = T5ForConditionalGeneration(config)

    assert (
        pinned(model)
        == pinned(model, fp16, match="hf")
        == {
            "encoder.block.0.layer.1.DenseReluDense.wo.weight",
            "decoder.block.0.layer.2.DenseReluDense.wo.weight",
        }
    )
    assert pinned(model, match="hf") == set()


def deepseek():
    config = DeepseekV3Config(
        hidden_size=8,
        intermediate_size=8,
        moe_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=9,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=4,
        q_lora_rank=4,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=4,
    )
    return DeepseekV3ForCausalLM(config)


@pytest.mark.parametrize("match", ["substring", "segment", "hf"])
def test_deepseek_pins_of_its_router_what_it_declares(match):
    router = "model.layers.1.mlp.gate"
    declared = DeepseekV3PreTrainedModel._keep_in_fp32_modules_strict  # with the weight since 5.24
    weight = {f"{router}.weight"} if "gate.weight" in declared else set()

    names = pinned(deepseek(), match=match)

    assert names == weight | {f"{router}.e_score_correction_bias"}
