import attrs
import pytest
import torch
from convert_families import (
    FAMILIES,
    OWN,
    assert_close,
    batch_of,
    loss_logits_and_gradients,
    small_model,
)

from automodel_fn import apply, backend_plan

MOE = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")
SILU_MOE = ("qwen3_moe", "mixtral", "deepseek_v3")
ALL = {
    "rms_norm": "torch_fp32",
    "attn": "eager",
    "gate_precision": "fp32",
    "rope_fusion": True,
    "swiglu": "fused",
    "loss": "fused",
}
CHOICES = {
    "rms_norm": (FAMILIES, {"rms_norm": "torch_fp32"}),
    "eager": (tuple(f for f in FAMILIES if f != "gpt_oss"), {"attn": "eager"}),
    "gate": (("qwen3_moe", "mixtral", "gpt_oss"), {"gate_precision": "fp32"}),
    "rope": (FAMILIES, {"rope_fusion": True}),
    "swiglu": (("llama", "qwen3", *SILU_MOE, "qwen3_vl"), {"swiglu": "fused"}),
    "loss": (FAMILIES, {"loss": "fused"}),
    "head": (FAMILIES, {"lm_head_precision": "fp32"}),
    "head and loss": (FAMILIES, {"lm_head_precision": "fp32", "loss": "fused"}),
    "all": (FAMILIES, ALL),
}
CASES = [(family, choice) for choice, (families, _) in CHOICES.items() for family in families]
cases = pytest.mark.parametrize(("family", "choice"), CASES)


@cases
def test_a_swapped_model_computes_what_the_own_one_does(family, choice, gpu):
    model, batch = small_model(family), batch_of(family)
    expected = loss_logits_and_gradients(model, batch)
    backend = attrs.evolve(OWN, experts="torch_mm", **CHOICES[choice][1])
    assert apply(backend_plan(model, backend, availability=gpu)).num_swaps
    found = loss_logits_and_gradients(model, batch)

    assert_close(found[0], expected[0], 1e-5)
    if CHOICES[choice][1].get("loss") == "fused":
        assert found[1] is None
        assert_close(model.eval()(**batch).logits, expected[1], 1e-5)
    else:
        assert_close(found[1], expected[1], 1e-5)
    for name, gradient in expected[2].items():
        assert_close(found[2][name], gradient, 1e-4)


@pytest.mark.parametrize("family", MOE)
def test_experts_in_a_loop_compute_what_grouped_ones_do(family, gpu):
    model, batch = small_model(family), batch_of(family)
    expected = loss_logits_and_gradients(model, batch)
    plan = backend_plan(model, attrs.evolve(OWN, experts="torch"), availability=gpu)
    assert [each.after for each in plan.entries if each.field == "experts"] == ["torch"]
    apply(plan)
    found = loss_logits_and_gradients(model, batch)

    assert_close(found[1], expected[1], 1e-5)
    for name, gradient in expected[2].items():
        assert_close(found[2][name], gradient, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_bf16_it_is_as_close_to_the_exact_model_as_the_own_one(family, gpu):
    exact, batch = small_model(family, dtype=torch.bfloat16).double(), batch_of(family)
    apply(backend_plan(exact, attrs.evolve(OWN, experts="torch"), availability=gpu))
    expected = exact(
        **{key: x.double() if key == "pixel_values" else x for key, x in batch.items()}
    )
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
    model = small_model(family, dtype=torch.bfloat16)
    own = model(**batch).loss
    apply(backend_plan(model, attrs.evolve(OWN, experts="torch_mm", **ALL), availability=gpu))

    error = abs(own - expected.loss)
    assert abs(model(**batch).loss - expected.loss) < 2 * error + 2e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_in_bf16_give_the_bits_of_the_familys_own(family, gpu):
    model, batch = small_model(family, dtype=torch.bfloat16), batch_of(family)
    if "pixel_values" in batch:
        batch["pixel_values"] = batch["pixel_values"].bfloat16()
    apply(backend_plan(model, attrs.evolve(OWN, experts="torch"), availability=gpu))
    expected = model(**batch).logits
    backend = attrs.evolve(OWN, rms_norm="torch_fp32", experts="torch")
    apply(backend_plan(model, backend, availability=gpu))
    found = model(**batch).logits

    assert torch.equal(found.view(torch.int16), expected.view(torch.int16))


@pytest.mark.parametrize("family", FAMILIES)
def test_trained_swapped_back_and_saved_it_is_a_plain_model(family, gpu, tmp_path):
    model, batch = small_model(family), batch_of(family)
    backend = attrs.evolve(OWN, **ALL)
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
