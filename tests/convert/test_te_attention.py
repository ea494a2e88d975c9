import sys

import attrs
import pytest
import torch
from convert_families import OWN, small_model
from torch import nn

from automodel_fn import ConfigError, apply, backend_plan
from automodel_fn.convert._te_attention import te_attention

pytestmark = pytest.mark.usefixtures("classes")
TE = attrs.evolve(OWN, attn="te")


class Recorder(nn.Module):
    """Writes down how Transformer Engine's class was made and what it was called with."""

    def __init__(self, **made):
        super().__init__()
        self.made, self.calls, self.modes = made, [], []

    def forward(self, q, k, v, **options):
        self.calls.append(options)
        self.modes.append(self.training)
        return q.flatten(2)


@pytest.fixture
def module(gpu):
    sys.modules["transformer_engine.pytorch"].DotProductAttention = Recorder
    model = small_model("llama")
    apply(backend_plan(model, TE, availability=gpu))
    return model.model.layers[0].self_attn


def heads(length=5):
    return [torch.randn(2, count, length, 16) for count in (4, 2, 2)]


def only(module):
    (core,) = module.te_cores.values()
    return core


def test_it_is_made_for_the_sizes_the_scale_and_the_dropout(module):
    found, weights = te_attention(module, *heads(), None, dropout=0.25, scaling=0.5)

    assert only(module).made == {
        "num_attention_heads": 4,
        "kv_channels": (16, 16),
        "num_gqa_groups": 2,
        "attention_dropout": 0.25,
        "qkv_format": "bshd",
        "softmax_scale": 0.5,
    }
    assert found.shape == (2, 5, 4, 16)
    assert weights is None


def test_another_scale_or_dropout_is_another_one(module):
    for dropout, scaling in ((0.0, 0.5), (0.1, 0.5), (0.1, 0.25), (0.1, 0.25)):
        te_attention(module, *heads(), None, dropout=dropout, scaling=scaling)

    assert len(module.te_cores) == 3


def test_it_is_in_the_mode_of_its_module(module):
    for is_training in (True, False, True):
        te_attention(module.train(is_training), *heads(), None)

    assert only(module).modes == [True, False, True]


@pytest.mark.parametrize(
    ("length", "is_causal", "kind"),
    [(5, None, "causal"), (5, True, "causal"), (5, False, "no_mask"), (1, True, "no_mask")],
)
def test_without_a_mask_the_order_of_tokens_says_all(module, length, is_causal, kind):
    te_attention(module, *heads(length), None, is_causal=is_causal)

    (call,) = only(module).calls
    assert (call["attn_mask_type"], call["attention_mask"]) == (kind, None)


def test_a_module_that_is_not_causal_hides_nothing(module):
    module.is_causal = False
    te_attention(module, *heads(), None)

    assert only(module).calls[0]["attn_mask_type"] == "no_mask"


def test_masks_of_both_kinds_hide_the_same(module):
    seen = torch.ones(5, 5).tril().bool()[None, None]
    added = torch.zeros(1, 1, 5, 5).masked_fill(~seen, torch.finfo(torch.float32).min)
    for mask in (seen, added):
        te_attention(module, *heads(), mask)

    assert all(torch.equal(call["attention_mask"], ~seen) for call in only(module).calls)
    assert {call["attn_mask_type"] for call in only(module).calls} == {"arbitrary"}


@pytest.mark.parametrize("name", ["s_aux", "softcap", "position_bias"])
def test_what_it_is_not_told_of_is_an_error(module, name):
    with pytest.raises(ConfigError, match=f"attn='te' takes no {name}; use attn='eager'"):
        te_attention(module, *heads(), None, **{name: torch.ones(4)})
    te_attention(module, *heads(), None, **{name: None})


def test_a_model_that_does_not_support_sdpa_is_left_alone(gpu, monkeypatch):
    model = small_model("llama")
    monkeypatch.setattr(type(model), "_supports_sdpa", False)
    monkeypatch.setattr(type(model.model), "_supports_sdpa", False)
    plan = backend_plan(model, TE, availability=gpu)
    found = [each for each in plan.entries if each.field == "te_attn"]

    assert {each.action for each in found} == {"skip"}
    assert all("does not support sdpa, whose masks it takes" in each.reason for each in found)


def test_who_asked_for_it_is_said(gpu):
    plan = backend_plan(small_model("llama"), attrs.evolve(OWN, attn="te"), availability=gpu)

    assert {each.reason for each in plan.entries if each.field == "te_attn"} == {
        "as asked, by attn='te'; its masks are those of sdpa"
    }
