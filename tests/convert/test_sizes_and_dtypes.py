"""What a machine can run, and a model's sizes and dtypes cannot: it is seen where the model is."""

import attrs
import pytest
import torch
from convert_families import OWN, small_model

from automodel_fn import BackendConfig, BackendUnavailableError, Resolution, backend_plan, resolve
from automodel_fn.backend import Package
from automodel_fn.convert._head_sizes import head_sizes

TE = attrs.evolve(OWN, attn="te")
FLEX = attrs.evolve(OWN, attn="flex")


def entries(model, backend, field, **options):
    plan = backend_plan(model, backend, **options)
    return [each for each in plan.entries if each.field == field]


def refused(model, backend, **options):
    with pytest.raises(BackendUnavailableError) as caught:
        backend_plan(model, backend, **options)
    head, *lines = str(caught.value).splitlines()
    assert head == "this backend cannot run in this model"
    return [line.strip() for line in lines]


def model_of(head_dim, **options):
    return small_model("llama", head_dim=head_dim, **options)


@pytest.mark.parametrize("head_dim", [12, 264])
def test_a_head_that_transformer_engine_has_no_fast_kernel_for_is_skipped(head_dim, gpu):
    model = model_of(16)
    model.model.layers[0].self_attn.head_dim = head_dim
    (found, other) = entries(model, TE, "te_attn", availability=gpu)

    assert other.action == "swap"
    assert (found.action, found.reason) == (
        "skip",
        f"head_dim={head_dim} is none that Transformer Engine has a fast kernel for: a multiple of "
        "8, 256 at most",
    )


@pytest.mark.parametrize("head_dim", [8, 64, 256])
def test_other_heads_are_taken(head_dim, gpu, classes):
    found = entries(model_of(head_dim), TE, "te_attn", availability=gpu)

    assert {each.action for each in found} == {"swap"}


@pytest.mark.parametrize("skip", [(), "model.layers.1"])
def test_by_name_and_for_no_module_is_an_error_that_says_what_to_do(skip, gpu):
    assert refused(model_of(12), TE, availability=gpu, skip=skip) == [
        "attn='te': no module of this model can have it: head_dim=12 is none that Transformer "
        "Engine has a fast kernel for: a multiple of 8, 256 at most; say attn='auto', or 'sdpa'"
    ]


def test_what_is_skipped_was_not_asked_for(gpu):
    plan = backend_plan(model_of(12), TE, availability=gpu, skip="*self_attn")

    assert "attn=te was asked for, and no module got it: skip='*self_attn'" in plan.notes


def test_a_resolution_that_has_no_fields_was_asked_for_by_name(gpu):
    backend = resolve(TE, gpu).backend

    assert refused(model_of(12), Resolution(backend, fields=()), availability=gpu)


@pytest.mark.usefixtures("classes")
def test_what_auto_chose_is_never_an_error(gpu):
    model = small_model("llama", hidden_size=36, intermediate_size=20, dtype=torch.float64)
    plan = backend_plan(model, attrs.evolve(OWN, linear="auto"), availability=gpu)

    assert {e.action for e in plan.entries if e.field == "linear"} == {"skip", "keep"}
    assert plan.notes == ()


@pytest.mark.parametrize("field", ["attn", "linear", "experts"])
def test_all_kinds_are_told_at_once(field, gpu, classes):
    model = small_model("qwen3_moe", head_dim=12, moe_intermediate_size=24, hidden_size=36)
    asked = attrs.evolve(OWN, attn="te", linear="te", experts="te", te_fp8="current")
    lines = {line.partition("=")[0]: line for line in refused(model, asked, availability=gpu)}

    assert set(lines) == {"attn", "linear", "experts", "te_fp8"}
    assert ": no module of this model can have it: " in lines[field]
    assert {"attn": "head_dim=12", "linear": "in_features=36", "experts": "gate_up_proj=36"}[
        field
    ] in lines[field]


def test_experts_of_float64_are_nothing_for_transformer_engine(gpu, classes):
    model = small_model("mixtral", dtype=torch.float64)
    (line,) = refused(model, attrs.evolve(OWN, experts="te"), availability=gpu)

    assert line.startswith("experts='te': no module of this model can have it: its weights are")


def test_experts_in_mxfp8_are_none_that_transformers_has(gpu):
    blackwell = attrs.evolve(
        gpu,
        devices=(attrs.evolve(gpu.devices[0], capability=(10, 0)),),
        packages=(*gpu.packages, Package("torchao", version="0.14")),
    )
    asked = attrs.evolve(OWN, experts="torch_mm_mxfp8")
    (line,) = refused(small_model("mixtral"), asked, availability=blackwell)

    assert line.startswith("experts='torch_mm_mxfp8': no module of this model can have it: ")
    assert "transformers has no experts in MXFP8; say experts='auto'" in line


def test_the_precision_of_a_head_of_float64_is_an_error(gpu):
    model = small_model("llama", dtype=torch.float64)
    (line,) = refused(model, attrs.evolve(OWN, lm_head_precision="fp32"), availability=gpu)

    assert line.endswith("say lm_head_precision=None, or cast the head")


def test_auto_takes_an_attention_that_any_head_can_have(gpu):
    plan = backend_plan(model_of(12), attrs.evolve(OWN, attn="auto"), availability=gpu)

    assert plan.notes == ()
    assert not [each for each in plan.entries if each.field == "te_attn"]


def test_of_latent_attention_the_sizes_are_those_that_are_multiplied():
    attention = small_model("deepseek_v3").model.layers[0].self_attn

    assert head_sizes(attention) == {"qk_head_dim": 16, "v_head_dim": 16}


@pytest.mark.parametrize(("head_dim", "action"), [(8, "skip"), (16, "swap")])
def test_small_heads_are_none_for_flex_attention_on_a_gpu(head_dim, action, gpu):
    model = model_of(head_dim)
    if action == "skip":
        (line,) = refused(model, FLEX, availability=gpu)
        assert line.startswith(
            f"attn='flex': no module of this model can have it: head_dim={head_dim}"
        )
        assert line.endswith("say attn='auto', or 'eager'")
    else:
        (found,) = entries(model, FLEX, "attn", availability=gpu)
        assert found.action == action


def test_on_a_cpu_small_heads_are_taken():
    (found,) = entries(model_of(8), FLEX, "attn")

    assert found.action == "swap"


@pytest.mark.parametrize("field", ["te_attn", "linear", "rms_norm"])
def test_float64_is_nothing_for_transformer_engine(field, gpu):
    asked = BackendConfig(attn="te", linear="te", rms_norm="te")
    model = small_model("llama", dtype=torch.float64)
    lines = refused(model, asked, availability=gpu)
    name = "attn" if field == "te_attn" else field

    assert len(lines) == 3
    (line,) = [line for line in lines if line.startswith(f"{name}='te': ")]
    assert "stored in float64; " in line
    model.model.layers[1].to(torch.bfloat16)
    found = entries(model, asked, field, availability=gpu)
    assert {each.action for each in found if each.name.startswith("model.layers.0")} == {"skip"}
    assert {each.action for each in found if each.name.startswith("model.layers.1")} == {"swap"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_that_attention_in_float32_has_no_fast_kernel_is_a_note(dtype, gpu, classes):
    backend = attrs.evolve(OWN, attn="te")
    notes = backend_plan(small_model("llama", dtype=dtype), backend, availability=gpu).notes

    assert any("stored in float32" in note for note in notes) == (dtype == torch.float32)
