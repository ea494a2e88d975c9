import copy
import sys
import types

import attrs
import pytest
import torch
from convert_families import (
    OWN,
    assert_close,
    batch_of,
    experts_of,
    loss_logits_and_gradients,
    small_model,
)
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from automodel_fn import (
    BackendPlan,
    BackendUnavailableError,
    ConfigError,
    apply,
    backend_plan,
)
from automodel_fn.convert._experts import grouped_forward
from automodel_fn.ops._experts import PRODUCT, TorchMM

MOE = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")
OWN = attrs.evolve(OWN, attn="eager")
families = pytest.mark.parametrize("family", MOE)
choices = pytest.mark.parametrize("choice", ["torch", "torch_mm", "te", "gmm"])


@pytest.fixture(autouse=True)
def grouped_gemm(monkeypatch):
    """The package, in plain torch."""

    def gmm(a, b, batch_sizes, trans_a=False, trans_b=False):
        assert a.dtype == b.dtype == torch.bfloat16
        assert a.is_contiguous()
        assert b.is_contiguous()
        assert (batch_sizes.dtype, batch_sizes.device.type) == (torch.int64, "cpu")
        assert not trans_a
        parts = zip(a.split(batch_sizes.tolist()), b.mT if trans_b else b, strict=True)
        return torch.cat([part @ weight for part, weight in parts])

    package, ops = types.ModuleType("grouped_gemm"), types.ModuleType("grouped_gemm.ops")
    ops.gmm = gmm
    monkeypatch.setitem(sys.modules, "grouped_gemm", package)
    monkeypatch.setitem(sys.modules, "grouped_gemm.ops", ops)


@families
@choices
@pytest.mark.usefixtures("exact")
def test_logits_and_gradients_are_those_of_the_loop_of_transformers(family, choice, planned):
    dtype = torch.bfloat16 if choice == "gmm" else torch.float32
    model, batch = small_model(family, dtype=dtype), batch_of(family)
    model.set_experts_implementation("eager")
    expected = loss_logits_and_gradients(model, batch)
    apply(planned(model, choice))
    found = loss_logits_and_gradients(model, batch)

    # In bf16 both are rounded, in another order.
    assert_close(found[1], expected[1], 1e-5 if dtype == torch.float32 else 3e-2)
    for name, gradient in expected[2].items():
        assert_close(found[2][name], gradient, 1e-4 if dtype == torch.float32 else 6e-2)


@families
@choices
@pytest.mark.usefixtures("exact")
def test_trained_swapped_back_saved_and_loaded_it_gives_the_same_logits(
    family, choice, planned, tmp_path
):
    model, batch = small_model(family), batch_of(family)
    parameters, keys = dict(model.named_parameters()), list(model.state_dict())
    report = apply(planned(model, choice))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=choice == "gmm"):
            losses.append(model(**batch).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[1] < losses[0]
    assert list(model.state_dict()) == keys
    assert all(parameters[name] is each for name, each in model.named_parameters())
    model.save_pretrained(tmp_path / "swapped")
    report.undo()
    model.save_pretrained(tmp_path / "back")
    model.set_experts_implementation("eager")
    expected = model.eval()(**batch).logits
    for folder in ("swapped", "back"):
        loaded = type(model).from_pretrained(tmp_path / folder).eval()
        loaded.set_experts_implementation("eager")

        assert torch.equal(loaded(**batch).logits, expected)


@pytest.mark.usefixtures("classes")
@choices
def test_undo_brings_back_all_that_was_there(choice, planned, state):
    model = small_model("mixtral", dtype=torch.bfloat16)
    before = state(model)
    report = apply(planned(model, choice))
    model(**batch_of("mixtral")).loss.backward()
    report.undo()

    assert state(model) == before


@pytest.mark.usefixtures("classes")
@choices
def test_the_inverse_of_a_plan_in_json_leads_back(choice, planned, state):
    model = small_model("qwen3_moe")
    before = state(model)
    plan = BackendPlan.from_json(planned(model, choice).to_json())
    apply(plan, model)
    apply(plan.inverse(), model)

    assert state(model) == before


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("first", ["torch_mm", "te", "gmm", "torch"])
@pytest.mark.parametrize("second", ["torch_mm", "te", "gmm", "torch"])
def test_one_choice_after_another_is_that_choice(first, second, planned):
    batch = batch_of("gpt_oss")
    model, other = (small_model("gpt_oss", dtype=torch.bfloat16) for _ in range(2))
    apply(planned(model, first))
    model(**batch)
    apply(planned(model, second))
    apply(planned(other, second))

    assert torch.equal(model(**batch).logits, other(**batch).logits)
    assert [type(each) for each in model.modules()] == [type(each) for each in other.modules()]


@pytest.mark.parametrize("choice", ["te", "gmm"])
@pytest.mark.usefixtures("classes")
def test_what_transformers_does_not_know_leaves_its_configs_alone(choice, planned):
    model = small_model("qwen3_moe", dtype=torch.bfloat16)
    before = model.config._experts_implementation
    plan = planned(model, choice)
    apply(plan)

    assert model.config._experts_implementation == before
    assert {each.field for each in plan.entries if "experts" in each.field} == {"grouped_experts"}
    assert {each.reason for each in plan.entries if each.field == "grouped_experts"} == {
        "as asked, in the place of transformers' own forward"
    }
    assert plan.notes == ()


def test_modules_can_be_skipped_one_by_one(planned):
    model = small_model("qwen3_moe")
    plan = planned(model, "torch_mm", skip="model.layers.0.mlp.experts")
    found = {e.name: e.action for e in plan.entries if e.field == "grouped_experts"}

    assert found == {"model.layers.0.mlp.experts": "skip", "model.layers.1.mlp.experts": "swap"}


@pytest.mark.parametrize("choice", ["torch_mm", "te", "gmm"])
@pytest.mark.usefixtures("classes")
def test_a_part_of_the_experts_is_left_to_transformers(choice, planned):
    model = small_model("qwen3_moe")
    for experts in experts_of(model):
        experts._is_expert_parallel = True
    plan = planned(model, choice)
    found = [each for each in plan.entries if each.field == "grouped_experts"]

    assert {each.action for each in found} == {"skip"}
    assert all(each.reason.startswith("it has a part of the experts only") for each in found)
    vain = [note for note in plan.notes if note.startswith(f"experts={choice} was asked for")]
    assert len(vain) == (choice != "torch_mm")


@pytest.mark.parametrize("choice", ["torch_mm", "te"])
@pytest.mark.usefixtures("classes")
def test_in_a_model_without_experts_there_is_one_note(choice, planned):
    (note,) = planned(small_model("llama"), choice).notes

    assert note == f"experts={choice} has nothing to act on in this model"


def test_gmm_in_another_dtype_is_an_error_and_autocast_makes_it_right(planned):
    model, batch = small_model("qwen3_moe"), batch_of("qwen3_moe")
    apply(planned(model, "gmm"))
    with pytest.raises(ConfigError, match=r"in torch.bfloat16 only, found torch.float32"):
        model(**batch)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch).loss.backward()

    assert experts_of(model)[0].down_proj.grad.dtype == torch.float32


def test_without_the_package_the_error_says_what_to_do(planned, monkeypatch):
    monkeypatch.setitem(sys.modules, "grouped_gemm.ops", None)
    model = small_model("qwen3_moe")
    with pytest.raises(BackendUnavailableError, match=r"grouped_gemm.*pip install grouped_gemm"):
        apply(planned(model, "gmm"))

    assert {type(each).__name__ for each in experts_of(model)} == {"Qwen3MoeExperts"}
    assert not any(hasattr(each, "_automodel_fn_product") for each in experts_of(model))
    with pytest.raises(BackendUnavailableError, match="experts='gmm': grouped_gemm is not"):
        backend_plan(model, attrs.evolve(OWN, experts="gmm"))


@choices
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("num_tokens", [1, 5])
@pytest.mark.usefixtures("exact")
def test_experts_without_tokens_are_untouched(choice, transposed, num_tokens, planned):
    family = "gpt_oss" if transposed else "qwen3_moe"
    model = small_model(family, dtype=torch.bfloat16)
    experts = experts_of(model)[0]
    x = torch.randn(num_tokens, 32, dtype=torch.bfloat16, requires_grad=True)
    # Of four experts the second and the last have no token.
    chosen = torch.tensor([[2, 0]]).expand(num_tokens, 2)
    weights = torch.rand(num_tokens, 2).bfloat16().requires_grad_()
    sources = (x, weights, experts.gate_up_proj, experts.down_proj)
    model.set_experts_implementation("eager")
    expected = experts(x, chosen, weights)
    gradients = torch.autograd.grad(expected.sum(), sources)
    apply(planned(model, choice))
    found = experts(x, chosen, weights)
    ours = torch.autograd.grad(found.sum(), sources)

    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-3)
    for gradient, other in zip(ours, gradients, strict=True):
        torch.testing.assert_close(gradient, other, rtol=5e-2, atol=5e-3)
    for gradient in ours[2:]:
        assert gradient[[0, 2]].any()
        assert not gradient[[1, 3]].any()


@pytest.mark.parametrize("choice", ["torch_mm", "te", "gmm"])
@pytest.mark.parametrize("family", ["gpt_oss", "qwen3_moe"])
@pytest.mark.usefixtures("exact")
def test_of_no_tokens_the_gradients_are_zeros(choice, family, planned):
    model = small_model(family, dtype=torch.bfloat16)
    apply(planned(model, choice))
    experts = experts_of(model)[0]
    x = torch.randn(0, 32, dtype=torch.bfloat16, requires_grad=True)
    chosen, weights = torch.empty(0, 2, dtype=torch.int64), torch.empty(0, 2).bfloat16()
    found = experts(x, chosen, weights)
    gradients = torch.autograd.grad(found.sum(), (x, *experts.parameters()))

    assert found.shape == (0, 32)
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("choice", ["torch_mm", "te", "gmm"])
@pytest.mark.usefixtures("exact")
def test_it_is_nearer_to_the_exact_sum_than_what_transformers_adds_up(choice, planned):
    """In bf16: each product is rounded once more there."""
    model = small_model("qwen3_moe", dtype=torch.bfloat16, num_experts=16, num_experts_per_tok=8)
    experts = experts_of(model)[0]
    x, chosen = torch.randn(64, 32).bfloat16(), torch.rand(64, 16).topk(8).indices
    weights = torch.rand(64, 8).softmax(-1).bfloat16()
    theirs = experts(x, chosen, weights)
    exact = copy.deepcopy(experts).double()
    exact.config._experts_implementation_internal = "eager"
    expected = exact(x.double(), chosen, weights.double())
    model.config._experts_implementation_internal = "grouped_mm"
    apply(planned(model, choice))
    found = experts(x, chosen, weights)

    assert (found - expected).square().mean() <= (theirs - expected).square().mean()


@pytest.mark.parametrize("choice", ["torch_mm", "te", "gmm"])
@pytest.mark.usefixtures("exact")
def test_frozen_experts_get_no_gradient_and_give_one(choice, planned):
    model, batch = small_model("gpt_oss", dtype=torch.bfloat16), batch_of("gpt_oss")
    apply(planned(model, choice))
    for experts in experts_of(model):
        experts.requires_grad_(False)
    model(**batch).loss.backward()

    assert all(p.grad is None for e in experts_of(model) for p in e.parameters())
    assert model.model.embed_tokens.weight.grad.any()


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("choice", ["torch_mm", "te", "gmm"])
def test_a_recompute_gives_the_same_gradients(choice, use_reentrant, planned):
    model = small_model("mixtral", dtype=torch.bfloat16)
    apply(planned(model, choice))
    experts = experts_of(model)[0]
    chosen, weights = torch.rand(9, 4).topk(2).indices, torch.rand(9, 2).bfloat16()
    x = torch.randn(9, 32).bfloat16().requires_grad_()
    sources = (x, experts.gate_up_proj, experts.down_proj)
    experts(x, chosen, weights).sum().backward()
    expected = [source.grad for source in sources]
    for source in sources:
        source.grad = None
    checkpoint(experts, x, chosen, weights, use_reentrant=use_reentrant).sum().backward()

    for source, gradient in zip(sources, expected, strict=True):
        assert torch.equal(source.grad, gradient)


# Of PyTorch's own compiler, which makes one to trace it.
@pytest.mark.filterwarnings("ignore:.*Function'> should not be instantiated:DeprecationWarning")
def test_torch_mm_is_compiled_whole_and_so_are_its_gradients(planned):
    model = small_model("gpt_oss", dtype=torch.bfloat16)
    apply(planned(model, "torch_mm"))
    experts = experts_of(model)[0]
    chosen, weights = torch.rand(9, 4).topk(2).indices, torch.rand(9, 2).bfloat16()
    x = torch.randn(9, 32).bfloat16().requires_grad_()
    expected = experts(x, chosen, weights)
    sources = (x, *experts.parameters())
    gradients = torch.autograd.grad(expected.sum(), sources)
    compiled = torch.compile(experts, backend="aot_eager", fullgraph=True)
    found = compiled(x, chosen, weights)

    assert torch.equal(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found.sum(), sources), gradients, strict=True):
        assert torch.equal(ours, theirs)


def test_swiglu_acts_within_grouped_experts(planned, machine):
    model, batch = small_model("qwen3_moe"), batch_of("qwen3_moe")
    expected = model(**batch).logits
    asked = attrs.evolve(OWN, experts="torch_mm", swiglu="fused")
    apply(backend_plan(model, asked, availability=machine))
    calls = []
    experts = experts_of(model)[0]
    own = type(experts)._apply_gate
    type(experts)._apply_gate = lambda self, x: calls.append(x.shape) or own(self, x)
    try:
        assert_close(model(**batch).logits, expected, 1e-5)
    finally:
        type(experts)._apply_gate = own

    assert own.__module__ == "automodel_fn.convert._mlps"
    assert calls == [(64, 64)] * 2


def test_experts_without_a_gate_and_with_a_norm_are_grouped(planned):
    experts = nn.Module()
    experts.has_gate, experts.has_bias, experts.is_transposed = False, False, False
    experts.has_post_expert_norm, experts.act_fn = True, F.relu
    experts.post_expert_norm = nn.LayerNorm(8)
    experts.up_proj = nn.Parameter(torch.randn(3, 16, 8))
    experts.down_proj = nn.Parameter(torch.randn(3, 8, 16))
    vars(experts)[PRODUCT] = TorchMM()
    x, weights = torch.randn(4, 8), torch.rand(4, 1)
    chosen = torch.tensor([[0], [2], [2], [0]])
    expected = torch.stack(
        [
            experts.post_expert_norm(F.relu(row @ experts.up_proj[e].T) @ experts.down_proj[e].T)
            for row, e in zip(x, chosen[:, 0].tolist(), strict=True)
        ]
    )

    torch.testing.assert_close(grouped_forward(experts, x, chosen, weights), expected * weights)


@pytest.mark.usefixtures("exact")
def test_experts_of_a_transformers_that_knows_of_no_norm_behind_them_are_grouped(planned):
    model, batch = small_model("qwen3_moe"), batch_of("qwen3_moe")
    expected = model(**batch).logits
    apply(planned(model, "torch_mm"))
    for experts in experts_of(model):
        vars(experts).pop("has_post_expert_norm", None)
        assert not hasattr(experts, "has_post_expert_norm")

    assert_close(model(**batch).logits, expected, 1e-5)


@pytest.mark.parametrize("choice", ["gmm", "torch_mm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_that_grouped_gemm_multiplies_in_bf16_only_is_a_note(dtype, choice, planned):
    notes = planned(small_model("mixtral", dtype=dtype), choice).notes
    told = [note for note in notes if "grouped_gemm multiplies in bf16 only" in note]

    assert len(told) == (choice == "gmm" and dtype == torch.float32)
    assert all("cast the model, use torch.autocast, or experts='torch_mm'" in note for note in told)
