"""What a machine can run, and a model's sizes and dtypes cannot: it is seen where the model is."""

import attrs
import pytest
import torch
from convert_families import OWN, small_model

from automodel_fn import BackendConfig, backend_plan
from automodel_fn.convert._head_sizes import head_sizes

TE = attrs.evolve(OWN, attn="te")
FLEX = attrs.evolve(OWN, attn="flex")


def entries(model, backend, field, **options):
    plan = backend_plan(model, backend, **options)
    return [each for each in plan.entries if each.field == field]


def model_of(head_dim, **options):
    return small_model("llama", head_dim=head_dim, **options)


@pytest.mark.parametrize("head_dim", [12, 264])
def test_a_head_that_transformer_engine_has_no_fast_kernel_for_is_skipped(head_dim, gpu):
    (found, _) = entries(model_of(head_dim), TE, "te_attn", availability=gpu)

    assert (found.action, found.reason) == (
        "skip",
        f"head_dim={head_dim} is none that Transformer Engine has a fast kernel for: a multiple of "
        "8, 256 at most",
    )


@pytest.mark.parametrize("head_dim", [8, 64, 256])
def test_other_heads_are_taken(head_dim, gpu, classes):
    found = entries(model_of(head_dim), TE, "te_attn", availability=gpu)

    assert {each.action for each in found} == {"swap"}


def test_who_asks_for_it_by_name_and_gets_it_nowhere_is_told(gpu):
    (note,) = backend_plan(model_of(12), TE, availability=gpu).notes

    assert note.startswith("te_attn=True was asked for, and no module got it: head_dim=12")


def test_auto_takes_an_attention_that_any_head_can_have(gpu):
    plan = backend_plan(model_of(12), attrs.evolve(OWN, attn="auto"), availability=gpu)

    assert plan.notes == ()
    assert not [each for each in plan.entries if each.field == "te_attn"]


def test_of_latent_attention_the_sizes_are_those_that_are_multiplied():
    attention = small_model("deepseek_v3").model.layers[0].self_attn

    assert head_sizes(attention) == {"qk_head_dim": 16, "v_head_dim": 16}


@pytest.mark.parametrize(("head_dim", "action"), [(8, "skip"), (16, "swap")])
def test_small_heads_are_none_for_flex_attention_on_a_gpu(head_dim, action, gpu):
    (found,) = entries(model_of(head_dim), FLEX, "attn", availability=gpu)

    assert found.action == action


def test_on_a_cpu_small_heads_are_taken():
    (found,) = entries(model_of(8), FLEX, "attn")

    assert found.action == "swap"


@pytest.mark.parametrize("field", ["te_attn", "linear", "rms_norm"])
def test_float64_is_nothing_for_transformer_engine(field, gpu):
    asked = BackendConfig(attn="te", linear="te", rms_norm="te")
    model = small_model("llama", dtype=torch.float64)
    found = entries(model, asked, field, availability=gpu)
    found = [each for each in found if each.name != "lm_head"]

    assert {each.action for each in found} == {"skip"}
    assert all("stored in float64" in each.reason for each in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_that_attention_in_float32_has_no_fast_kernel_is_a_note(dtype, gpu, classes):
    backend = attrs.evolve(OWN, attn="te")
    notes = backend_plan(small_model("llama", dtype=dtype), backend, availability=gpu).notes

    assert any("stored in float32" in note for note in notes) == (dtype == torch.float32)
