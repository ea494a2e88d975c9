import copy
import pickle
import sys

import attrs
import pytest
import torch
from convert_families import OWN, batch_of, small_model
from torch import nn
from torch.utils.checkpoint import checkpoint

from automodel_fn import BackendUnavailableError, apply, backend_plan, step_context

TE = attrs.evolve(OWN, linear="te")
pytestmark = pytest.mark.usefixtures("classes")


@pytest.fixture
def llama():
    return small_model("llama")


def actions(plan, field):
    return {each.name: (each.action, each.reason) for each in plan.entries if each.field == field}


def test_linear_layers_become_transformer_engines_and_keep_their_parameters(llama, gpu, classes):
    parameters, keys = dict(llama.named_parameters()), list(llama.state_dict())
    apply(backend_plan(llama, TE, availability=gpu))
    layer = llama.model.layers[0].mlp.up_proj

    assert isinstance(layer, classes.linear)
    assert isinstance(layer, nn.Linear)
    assert all(parameters[name] is each for name, each in llama.named_parameters())
    assert list(llama.state_dict()) == keys
    assert layer.num_quantizations == 0


@pytest.mark.parametrize("bias", [True, False])
def test_they_compute_with_the_same_weights(bias, gpu, classes):
    model = nn.Sequential(nn.Linear(32, 16, bias=bias))
    made = classes.linear(32, 16, bias=bias)
    made.load_state_dict(model[0].state_dict())
    apply(backend_plan(model, TE, availability=gpu))
    x = torch.randn(3, 32)

    assert torch.equal(model(x), made(x))


def test_they_see_the_step(llama, gpu):
    apply(backend_plan(llama, TE, availability=gpu))
    batch, layer = batch_of("llama"), llama.model.layers[0].mlp.up_proj
    for first in (True, False, False):
        with step_context(first_microbatch=first):
            llama(**batch).loss.backward()

    assert layer.num_quantizations == 1


def test_undo_brings_back_all_that_was_there(llama, gpu, state):
    before = state(llama)
    report = apply(backend_plan(llama, attrs.evolve(TE, rms_norm="te"), availability=gpu))
    llama(**batch_of("llama"))
    report.undo()

    assert state(llama) == before


def test_copies_and_pickles_run_as_the_swapped_model_does(gpu):
    model = nn.Sequential(nn.Linear(32, 16))
    apply(backend_plan(model, TE, availability=gpu))
    x = torch.randn(3, 32)

    again = copy.deepcopy(model)
    assert torch.equal(again(x), model(x))
    assert type(again[0]) is type(model[0])
    how = model[0].__reduce_ex__(pickle.DEFAULT_PROTOCOL)
    assert type(how[0](*how[1])) is type(model[0])


def test_the_head_stays(llama, gpu):
    action, reason = actions(backend_plan(llama, TE, availability=gpu), "linear")["lm_head"]

    assert action == "keep"
    assert reason.startswith("the head")


def test_a_tied_weight_stays(gpu):
    model = nn.ModuleDict({"embed": nn.Embedding(32, 16), "out": nn.Linear(16, 32, bias=False)})
    model["out"].weight = model["embed"].weight
    plan = backend_plan(model, TE, availability=gpu)

    assert actions(plan, "linear") == {"out": ("keep", "its weight is tied to embed.weight")}


def test_a_size_that_fp8_cannot_have_is_skipped_with_fp8_only(gpu):
    model = nn.Sequential(nn.Linear(32, 20), nn.Linear(32, 32))
    with_fp8 = backend_plan(model, attrs.evolve(TE, te_fp8="current"), availability=gpu)

    assert actions(with_fp8, "linear")["0"] == (
        "skip",
        "out_features=20 is no multiple of 16, as FP8 needs",
    )
    assert actions(with_fp8, "linear")["1"][0] == "swap"
    assert actions(backend_plan(model, TE, availability=gpu), "linear")["0"][0] == "swap"


def test_a_linear_with_a_forward_of_its_own_is_skipped(gpu):
    class Odd(nn.Linear):
        def forward(self, x):
            return super().forward(x) * 2

    plan = backend_plan(nn.Sequential(Odd(16, 16)), TE, availability=gpu)

    assert actions(plan, "linear")["0"] == ("skip", "Odd has a forward of its own")


def test_norms_become_transformer_engines(llama, gpu, classes):
    apply(backend_plan(llama, attrs.evolve(OWN, rms_norm="te"), availability=gpu))
    x = torch.randn(3, 32)
    own = small_model("llama").model.norm

    assert isinstance(llama.model.norm, classes.rms_norm)
    assert llama.model.norm.eps == llama.model.norm.variance_epsilon
    torch.testing.assert_close(llama.model.norm(x), own(x))


def test_fp8_is_on_in_the_model_and_in_each_block_that_is_recomputed(llama, gpu, autocasts):
    plan = backend_plan(llama, attrs.evolve(TE, te_fp8="current"), availability=gpu)

    assert set(actions(plan, "te_fp8")) == {"", "model.layers.0", "model.layers.1"}
    apply(plan)
    autocasts.clear()
    llama(**batch_of("llama"))
    assert autocasts == ["current", *["current", "left"] * 2, "left"]


def test_fp8_comes_to_layers_that_were_made_before(llama, gpu, autocasts):
    apply(backend_plan(llama, TE, availability=gpu))
    before = [type(each) for each in llama.modules()]
    plan = backend_plan(llama, attrs.evolve(TE, te_fp8="current"), availability=gpu)
    assert {each.field for each in plan.entries if each.changes} == {"te_fp8"}
    report = apply(plan)
    llama(**batch_of("llama"))
    assert autocasts == ["current", *["current", "left"] * 2, "left"]
    report.undo()

    assert [type(each) for each in llama.modules()] == before


def test_a_recompute_runs_in_fp8(llama, gpu, autocasts):
    apply(backend_plan(llama, attrs.evolve(TE, te_fp8="current"), availability=gpu))
    llama.activation_checkpointing_enable()
    loss = llama(**batch_of("llama"), use_cache=False).loss
    autocasts.clear()
    loss.backward()

    assert autocasts == ["current", "left"] * 2


def test_where_no_block_is_recomputed_fp8_is_on_in_each_layer(gpu, autocasts):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    apply(backend_plan(model, attrs.evolve(TE, te_fp8="current"), availability=gpu))
    loss = checkpoint(model[1], model[0](torch.randn(2, 16)), use_reentrant=False).sum()
    autocasts.clear()
    loss.backward()

    assert autocasts[:1] == ["current"]


def test_experts_alone_are_recomputed_in_fp8(gpu, autocasts):
    model = small_model("qwen3_moe")
    asked = attrs.evolve(OWN, experts="te", te_fp8="current")
    apply(backend_plan(model, asked, availability=gpu))
    model.activation_checkpointing_enable()
    loss = model(**batch_of("qwen3_moe"), use_cache=False).loss
    autocasts.clear()
    loss.backward()

    assert autocasts == ["current", "left"] * 2


def test_fp8_is_left_off_where_experts_have_a_size_that_it_cannot_have(gpu, autocasts):
    model = small_model("mixtral", intermediate_size=24)
    apply(backend_plan(model, attrs.evolve(OWN, experts="te"), availability=gpu))
    asked = attrs.evolve(OWN, experts="te", te_fp8="current")

    with pytest.raises(
        BackendUnavailableError,
        match=r"te_fp8='current': no module .*: model.layers.0.mlp.experts: a size of down_proj=24",
    ):
        backend_plan(model, asked, availability=gpu)


class DotProductAttention(nn.Module):
    """Transformer Engine's, in what is asked of it: batch first, True masks out."""

    def __init__(
        self,
        num_attention_heads,
        kv_channels,
        num_gqa_groups,
        attention_dropout,
        qkv_format,
        softmax_scale,
    ):
        super().__init__()
        assert qkv_format == "bshd"
        self.scale, self.kinds = softmax_scale, []

    def forward(self, q, k, v, attention_mask, attn_mask_type, qkv_format):
        assert (attention_mask is None) == (attn_mask_type != "arbitrary")
        self.kinds.append(attn_mask_type)
        heads = (each.transpose(1, 2) for each in (q, k, v))
        found = nn.functional.scaled_dot_product_attention(
            *heads,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attn_mask_type == "causal",
            scale=self.scale,
            enable_gqa=True,
        )
        return found.transpose(1, 2).flatten(2)


@pytest.fixture
def attention():
    sys.modules["transformer_engine.pytorch"].DotProductAttention = DotProductAttention
    return attrs.evolve(OWN, attn="te", experts="torch_mm")


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "deepseek_v3", "qwen3_vl"])
def test_attention_becomes_transformer_engines_and_computes_the_same(family, gpu, attention):
    model, batch = small_model(family), batch_of(family)
    expected, own = model(**batch), type(model.model)
    keys = list(model.state_dict())
    report = apply(backend_plan(model, attention, availability=gpu))
    found = model(**batch)

    assert report.num_swaps >= 2
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)
    assert list(model.state_dict()) == keys
    assert any(getattr(each, "te_cores", None) for each in model.modules())
    report.undo()
    assert torch.equal(model(**batch).logits, expected.logits)
    assert type(model.model) is own


def test_padding_is_masked_and_without_it_there_is_no_mask(llama, gpu, attention):
    apply(backend_plan(llama, attention, availability=gpu))
    batch, own = batch_of("llama"), small_model("llama")
    llama(**batch)
    batch["attention_mask"][:, :3] = 0
    found, expected = llama(**batch).logits, own(**batch).logits

    assert copy.deepcopy(llama).model.layers[0].self_attn.te_cores == {}
    (core,) = llama.model.layers[0].self_attn.te_cores.values()
    assert core.kinds == ["causal", "arbitrary"]
    torch.testing.assert_close(found[:, 3:], expected[:, 3:], rtol=1e-4, atol=1e-5)


def test_attention_with_a_sliding_window_is_left_alone(gpu, attention):
    found = actions(backend_plan(small_model("gemma3"), attention, availability=gpu), "te_attn")

    assert {action for action, _ in found.values()} == {"skip"}
    assert all("sliding window" in reason for _, reason in found.values())


def test_attention_with_sinks_is_left_alone(gpu, attention):
    found = actions(backend_plan(small_model("gpt_oss"), attention, availability=gpu), "te_attn")

    assert {action for action, _ in found.values()} == {"skip"}
    assert all("sinks" in reason for _, reason in found.values())


def test_fp8_is_left_off_where_a_layer_has_a_size_that_it_cannot_have(gpu, autocasts):
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(20, 32))
    apply(backend_plan(model, TE, availability=gpu))
    plan = backend_plan(model, attrs.evolve(TE, te_fp8="current"), availability=gpu)
    found = actions(plan, "te_fp8")

    assert {name: action for name, (action, _) in found.items()} == {
        "": "skip",
        "0": "swap",
        "1": "skip",
    }
    assert found["1"][1].startswith("1: in_features=20 is no multiple of 16")
    assert found[""] == found["1"]
    with pytest.raises(BackendUnavailableError, match=r"te_fp8='current': no module .* 1: in_feat"):
        backend_plan(model[1:], attrs.evolve(TE, te_fp8="current"), availability=gpu)


@pytest.mark.parametrize(
    ("model", "fields", "said"),
    [
        (nn.Sequential(nn.ReLU()), {"linear": "te"}, "becomes it; say linear='te' or"),
        (nn.Sequential(nn.Linear(16, 16)), {"linear": "torch"}, "becomes it; say linear='te' or"),
        (nn.Sequential(nn.Linear(20, 16)), {"linear": "auto"}, "(0: in_features=20 is no mult"),
    ],
)
def test_fp8_without_a_layer_to_act_on_is_an_error(model, fields, said, gpu):
    asked = attrs.evolve(TE, te_fp8="current", experts="auto", dispatcher="auto", **fields)

    with pytest.raises(BackendUnavailableError) as caught:
        backend_plan(model, asked, availability=gpu)
    (line,) = str(caught.value).splitlines()[1:]
    assert line.strip().startswith(
        "te_fp8='current': no module of this model can have it: no layer in it is Transformer "
        "Engine's, or becomes it"
    )
    assert said in line


def test_fp8_without_a_layer_that_is_not_skipped_is_a_note(gpu):
    asked = attrs.evolve(TE, te_fp8="current")
    plan = backend_plan(nn.Sequential(nn.Linear(16, 16)), asked, availability=gpu, skip="0")

    assert {action for action, _ in actions(plan, "te_fp8").values()} == {"skip"}
    (note,) = [note for note in plan.notes if note.startswith("te_fp8=")]
    assert note.endswith("no layer in it becomes Transformer Engine's: skip='0'")
