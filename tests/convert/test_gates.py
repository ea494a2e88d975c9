import attrs
import pytest
import torch
from convert_families import OWN, batch_of, small_model

from automodel_fn import apply, backend_plan
from automodel_fn.convert._gates import even_experts

OWN = attrs.evolve(OWN, attn="eager")
MOE = ("qwen3_moe", "mixtral", "gpt_oss", "deepseek_v3")
families = pytest.mark.parametrize("family", MOE)


class Router:
    def __init__(self, num_experts, top_k):
        self.num_experts, self.top_k = num_experts, top_k


def routers(model):
    return [each for each in model.modules() if type(each).__name__.endswith("Router")]


@families
def test_a_fake_gate_gives_every_expert_as_many_tokens(family):
    model = small_model(family)
    apply(backend_plan(model, attrs.evolve(OWN, fake_balanced_gate=True)))
    _, scores, experts = routers(model)[0](torch.randn(6, 32))

    assert experts.flatten().bincount().tolist() == [3, 3, 3, 3]
    assert torch.equal(scores, torch.full((6, 2), 0.5))
    model(**batch_of(family)).loss.backward()


def test_where_the_gate_is_fake_its_precision_is_kept():
    asked = attrs.evolve(OWN, fake_balanced_gate=True, gate_precision="fp32")
    plan = backend_plan(small_model("qwen3_moe"), asked)

    assert {e.reason for e in plan.entries if e.field == "gate_precision"} == {
        "the fake gate takes the place of the router"
    }


@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_the_experts_of_a_token_are_distinct_and_there_are_such(noise):
    found = even_experts(1000, Router(7, 3), noise, torch.device("cpu"))

    assert found.shape == (1000, 3)
    assert found.min() >= 0
    assert found.max() < 7
    assert all(len(set(row)) == 3 for row in found.tolist())


def test_noise_makes_the_gate_uneven_the_more_the_more_there_is():
    def spread(noise):
        counts = even_experts(4096, Router(8, 2), noise, torch.device("cpu")).flatten().bincount()
        return (counts.max() - counts.min()).item()

    assert spread(0.0) == 0
    assert spread(0.0) < spread(0.2) < 4096
    assert torch.equal(
        even_experts(64, Router(8, 2), 0.5, torch.device("cpu")),
        even_experts(64, Router(8, 2), 0.5, torch.device("cpu")),
    )


def test_a_fake_gate_waits_for_nothing():
    # Of a meta tensor nothing can be read.
    found = even_experts(64, Router(8, 2), 0.5, torch.device("meta"))

    assert found.shape == (64, 2)


def test_a_recompute_sends_tokens_where_the_forward_did():
    model = small_model("qwen3_moe")
    asked = attrs.evolve(OWN, fake_balanced_gate=True, fake_gate_noise=0.5)
    apply(backend_plan(model, asked))
    batch = batch_of("qwen3_moe")
    model(**batch).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    model.activation_checkpointing_enable()
    model(**batch, use_cache=False).loss.backward()

    for name, gradient in expected.items():
        assert torch.equal(model.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral", "gpt_oss"])
def test_a_gate_projects_in_the_precision_that_was_asked_for(family):
    model = small_model(family, dtype=torch.bfloat16)
    apply(backend_plan(model, attrs.evolve(OWN, gate_precision="fp32")))
    router, x = routers(model)[0], torch.randn(6, 32).bfloat16()
    bias = router._parameters.get("bias")
    expected = x.float() @ router.weight.float().T + (0 if bias is None else bias.float())

    assert router(x)[0].dtype == torch.float32
    torch.testing.assert_close(router(x)[0], expected)
    model(**batch_of(family)).loss.backward()
    assert router.weight.grad.dtype == torch.bfloat16


def test_a_gate_in_another_precision_is_compiled_whole():
    model = small_model("qwen3_moe", dtype=torch.bfloat16)
    apply(backend_plan(model, attrs.evolve(OWN, gate_precision="fp32")))
    router, x = routers(model)[0], torch.randn(6, 32).bfloat16()
    compiled = torch.compile(router, backend="aot_eager", fullgraph=True)

    assert torch.equal(compiled(x)[1], router(x)[1])
