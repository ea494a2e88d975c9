import functools

import pytest
import torch
import transformers
from hypothesis import example, given
from hypothesis import strategies as st

from automodel_fn import BackendConfig
from automodel_fn.testing import check_swaps, cpu_backends

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_experts_per_tok": 2,
    "num_experts": 4,
}
moves = st.lists(st.none() | cpu_backends(), max_size=6)


@functools.cache
def model(family):
    config = getattr(transformers, f"{family}Config")(**SIZES)
    with torch.device("meta"):
        return getattr(transformers, f"{family}ForCausalLM")(config)


@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
@example([BackendConfig(), BackendConfig(attn="eager"), None, BackendConfig(rms_norm="torch")])
@example([BackendConfig(fake_balanced_gate=True), BackendConfig(gate_precision="bf16"), None, None])
@given(moves)
def test_plans_and_inverses_end_where_they_began(family, moves):
    check_swaps(model(family), moves)
