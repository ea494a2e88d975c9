import copy
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from automodel_fn import BackendUnavailableError, build


class DotProductAttention(nn.Module):
    """Computes what Transformer Engine's class computes, and writes down how it was made."""

    def __init__(self, **made):
        super().__init__()
        self.made = made

    def forward(self, q, k, v, attn_mask_type, qkv_format):
        assert qkv_format == "bshd"
        assert all(each.is_contiguous() for each in (q, k, v))
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        is_causal = {"causal": True, "no_mask": False}[attn_mask_type]
        scale = self.made["softmax_scale"]
        found = F.scaled_dot_product_attention(
            q, k, v, is_causal=is_causal, scale=scale, enable_gqa=True
        )
        return found.transpose(1, 2).flatten(2)


@pytest.fixture
def engine(classes):
    module = sys.modules["transformer_engine.pytorch"]
    module.DotProductAttention = DotProductAttention
    return module


@pytest.fixture
def heads():
    return [torch.randn(2, 9, count, 8) for count in (4, 2, 2)]


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_it_is_asked_for_what_the_written_out_one_computes(heads, is_causal, scale):
    options = {"is_causal": is_causal, "scale": scale}
    found = build.attention(backend="te", **options)(*heads)
    expected = build.attention(backend="eager", **options)(*heads)

    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


@pytest.mark.usefixtures("engine")
def test_values_may_be_of_another_size_than_keys(heads):
    q, k, _ = heads
    made = build.attention(backend="te")

    assert made(q, k, torch.randn(2, 9, 2, 24)).shape == (2, 9, 4, 24)
    (core,) = made._cores.values()
    assert core.made["kv_channels"] == (8, 24)


@pytest.mark.usefixtures("engine")
def test_one_is_made_for_each_size_and_kept(heads):
    made = build.attention(backend="te")
    for _ in range(2):
        made(*heads)
        made(*(torch.randn(1, 4, count, 16) for count in (4, 4, 4)))

    assert len(made._cores) == 2


@pytest.mark.usefixtures("engine")
@pytest.mark.parametrize("is_training", [True, False])
def test_it_is_in_the_mode_of_the_module(heads, is_training):
    made = build.attention(backend="te").train(is_training)
    made(*heads)

    (core,) = made._cores.values()
    assert core.training is is_training


@pytest.mark.usefixtures("engine")
def test_heads_that_were_transposed_are_laid_out_first(heads):
    turned = [each.transpose(1, 2).contiguous().transpose(1, 2) for each in heads]
    made = build.attention(backend="te")

    assert torch.equal(made(*turned), made(*heads))


@pytest.mark.usefixtures("engine")
def test_it_has_no_state_and_a_copy_makes_its_own(heads):
    made = build.attention(backend="te")
    made(*heads)
    copied = copy.deepcopy(made)

    assert dict(made.state_dict()) == {}
    assert list(made.modules()) == [made]
    assert copied._cores == {}
    assert torch.equal(copied(*heads), made(*heads))


@pytest.mark.usefixtures("engine")
def test_it_is_made_on_meta_and_gives_shapes_there(filled, heads):
    with torch.device("meta"):
        made = build.attention(backend="te")
    found = made(*(each.to("meta") for each in heads))

    assert (found.device.type, found.shape) == ("meta", (2, 9, 4, 8))
    assert torch.equal(filled(made)(*heads), build.attention(backend="te")(*heads))


@pytest.mark.usefixtures("engine")
def test_its_options_are_shown():
    assert repr(build.attention(backend="te", scale=0.5)) == (
        "TEAttention(te, is_causal=True, scale=0.5)"
    )


@pytest.mark.usefixtures("no_transformer_engine")
def test_without_transformer_engine_it_is_an_error():
    with pytest.raises(BackendUnavailableError, match=r"transformer_engine\.pytorch"):
        build.attention(backend="te")
