import pytest
import torch
from torch.nn import functional as F

from automodel_fn import ConfigError, RopeConfig, build


@pytest.fixture
def heads():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 9, count, 8, generator=generator) for count in (4, 2, 2)]


@pytest.mark.slow
def test_flex_attention_computes_what_the_written_out_one_does(heads):
    found = build.attention(backend="flex")(*heads)

    torch.testing.assert_close(found, build.attention(backend="eager")(*heads))


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_every_backend_computes_the_same_attention(heads, backend, is_causal, scale):
    q, k, v = (each.double().transpose(1, 2) for each in heads)
    k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, scale=scale)
    made = build.attention(backend=backend, is_causal=is_causal, scale=scale)

    found = made(*heads)
    assert found.shape == heads[0].shape
    torch.testing.assert_close(found.double(), expected.transpose(1, 2), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_later_token_changes_nothing_before_it(heads, backend):
    q, k, v = heads
    made = build.attention(backend=backend)
    before = made(q, k, v)
    k[:, -1], v[:, -1] = 5.0, 5.0

    assert torch.equal(made(q, k, v)[:, :-1], before[:, :-1])


def test_an_unknown_backend_is_an_error():
    with pytest.raises(ConfigError, match="did you mean 'sdpa'"):
        build.attention(backend="spda")


def test_rotary_embeddings_are_those_of_transformers(heads):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import (
        LlamaRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    q, k, _ = heads
    theirs = LlamaRotaryEmbedding(LlamaConfig(hidden_size=32, num_attention_heads=4))
    cos, sin = theirs(q, torch.arange(9)[None])
    expected = apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=2)

    assert all(map(torch.equal, build.rope(8, 16)(q, k), expected))


def test_positions_may_be_given(heads):
    q, k, _ = heads
    made = build.rope(8, 32, config=RopeConfig(500.0))

    shifted = made(q, k, 3)
    listed = made(q, k, torch.arange(3, 12))
    assert all(map(torch.equal, shifted, listed))


def test_tables_that_were_made_on_meta_are_filled_by_reset_parameters(heads):
    q, k, _ = heads
    made = build.rope(8, 16, device="meta").to_empty(device="cpu")
    made.reset_parameters()

    assert torch.equal(made(q, k)[0], build.rope(8, 16)(q, k)[0])
    assert list(made.state_dict()) == []


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        build.rope(0, -1)
    assert "head_dim=0" in str(caught.value)
    assert "num_positions=-1" in str(caught.value)
    with pytest.raises(ConfigError, match="config='big' must be a RopeConfig"):
        build.rope(8, 16, config="big")
