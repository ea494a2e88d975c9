import attrs
import pytest
import torch
from convert_families import FAMILIES, batch_of, small_model

from automodel_fn import BackendConfig, apply, backend_plan

OWN = BackendConfig(attn="sdpa", linear="torch", rms_norm="torch", rope_fusion=False)
MOE = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")
CHOICES = {
    "rms_norm": (FAMILIES, {"rms_norm": "torch_fp32"}),
    "eager": (tuple(f for f in FAMILIES if f != "gpt_oss"), {"attn": "eager"}),
    "experts": (MOE, {"experts": "torch"}),
    "gate": (("qwen3_moe", "mixtral", "gpt_oss"), {"gate_precision": "fp32"}),
    "all": (FAMILIES, {"rms_norm": "torch_fp32", "attn": "eager", "gate_precision": "fp32"}),
}
CASES = [(family, choice) for choice, (families, _) in CHOICES.items() for family in families]
cases = pytest.mark.parametrize(("family", "choice"), CASES)


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


@cases
def test_a_swapped_model_computes_what_the_own_one_does(family, choice, gpu):
    model, batch = small_model(family), batch_of(family)
    expected = loss_logits_and_gradients(model, batch)
    apply(backend_plan(model, attrs.evolve(OWN, **CHOICES[choice][1]), availability=gpu))
    found = loss_logits_and_gradients(model, batch)

    assert_close(found[0], expected[0], 1e-5)
    assert_close(found[1], expected[1], 1e-5)
    for name, gradient in expected[2].items():
        assert_close(found[2][name], gradient, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_in_bf16_give_the_bits_of_the_familys_own(family, gpu):
    model, batch = small_model(family, dtype=torch.bfloat16), batch_of(family)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
    expected = model(**batch).logits
    backend = attrs.evolve(OWN, rms_norm="torch_fp32", experts="torch_mm")
    apply(backend_plan(model, backend, availability=gpu))
    found = model(**batch).logits

    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_swapped_back_and_saved_it_is_a_plain_model(family, gpu, tmp_path):
    model, batch = small_model(family), batch_of(family)
    backend = attrs.evolve(OWN, **CHOICES["all"][1])
    report = apply(backend_plan(model, backend, availability=gpu))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(tmp_path / "swapped")
    report.undo()
    model.save_pretrained(tmp_path / "back")
    expected = model.eval()(**batch).logits
    for folder in ("swapped", "back"):
        loaded = type(model).from_pretrained(tmp_path / folder).eval()

        assert type(loaded) is type(model)
        assert torch.equal(loaded(**batch).logits, expected)
