import copy

import attrs
import pytest
import torch
import transformers

from automodel_fn import (
    BackendConfig,
    TEFp8Config,
    apply,
    backend_plan,
    build,
    cache_counts,
    probe,
    step_context,
)
from automodel_fn.convert._gates import even_experts
from automodel_fn.ops._routing import combined, dispatched, routing_kernel, routing_of
from automodel_fn.te import _grouped

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

OWN = BackendConfig(
    attn="eager", linear="torch", rms_norm="torch", rope_fusion=False, swiglu="torch", loss="torch"
)
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 512,
}
FAMILIES = ("Qwen3Moe", "Mixtral", "GptOss")
families = pytest.mark.parametrize("family", FAMILIES)
choices = pytest.mark.parametrize("choice", ["torch", "torch_mm", "te", "gmm"])


@pytest.fixture
def needed(request):
    """Skips where what a choice is made of is not installed."""

    def check(choice):
        if choice == "te":
            request.getfixturevalue("classes")
        if choice == "gmm":
            pytest.importorskip("grouped_gemm")

    return check


def model_of(family, dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    with torch.device("cuda"):
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).train()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "experts" in name:
                    parameter.normal_(std=0.1)
    return model


def experts_of(model):
    (found,) = (module for module in model.modules() if hasattr(module, "has_gate"))
    return found


def routed(num_tokens=200, num_experts=8, top_k=2, seed=1):
    generator = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(num_tokens, 128, device="cuda", generator=generator).bfloat16()
    # The last expert has no token.
    scores = torch.rand(num_tokens, num_experts - 1, device="cuda", generator=generator)
    weights = torch.rand(num_tokens, top_k, device="cuda", generator=generator).bfloat16()
    return x, scores.topk(top_k).indices, weights


def outputs(experts, x, chosen, weights):
    x, weights = (each.detach().clone().requires_grad_() for each in (x, weights))
    y = experts(x, chosen, weights)
    dy = torch.randn(y.shape, device="cuda", generator=torch.Generator("cuda").manual_seed(2))
    sources = (x, weights, *experts.parameters())
    return y.detach(), *torch.autograd.grad(y, sources, dy.to(y.dtype))


def exact_outputs(experts, x, chosen, weights):
    exact = copy.deepcopy(experts).double()
    exact.config._experts_implementation_internal = "eager"
    return outputs(exact, x.double(), chosen, weights.double())


def swapped(model, choice, **fields):
    apply(backend_plan(model, attrs.evolve(OWN, experts=choice, **fields)))
    return experts_of(model)


def errors(found, expected):
    return [
        ((ours.double() - theirs).norm() / theirs.norm()).item()
        for ours, theirs in zip(found, expected, strict=True)
    ]


@families
@choices
def test_outputs_and_gradients_are_as_near_to_float64_as_those_of_the_loop(family, choice, needed):
    needed(choice)
    model, routing = model_of(family), routed()
    experts = experts_of(model)
    expected = exact_outputs(experts, *routing)
    loop = errors(outputs(swapped(model, "torch"), *routing), expected)
    found = errors(outputs(swapped(model, choice), *routing), expected)

    assert all(ours <= 1.2 * theirs + 1e-4 for ours, theirs in zip(found, loop, strict=True)), (
        found,
        loop,
    )


def delayed_scaling():
    from transformer_engine.common.recipe import DelayedScaling

    return DelayedScaling()


@families
@pytest.mark.parametrize("recipe", ["current", "delayed", "block"])
@pytest.mark.usefixtures("classes")
def test_in_fp8_they_are_near(family, recipe):
    verdict = probe().verdict(f"te_fp8={recipe}")
    if not verdict.can_run:
        pytest.skip(verdict.reason)
    model, routing = model_of(family), routed()
    expected = exact_outputs(experts_of(model), *routing)
    fp8 = TEFp8Config(delayed_scaling() if recipe == "delayed" else recipe)
    experts = swapped(model, "te", te_fp8=fp8)
    for _ in range(3):  # Delayed scaling begins with a scale of 1.
        with fp8.autocast():
            found = outputs(experts, *routing)

    assert max(errors(found, expected)) < 0.2
    assert max(errors(found, expected)) > 1e-2, "it was not in FP8"


@families
@pytest.mark.usefixtures("classes")
def test_kept_fp8_weights_are_those_of_the_step_and_follow_the_parameter(family):
    model, routing = model_of(family), routed()
    experts = swapped(model, "te", te_fp8="current")
    fp8 = BackendConfig(experts="te", te_fp8="current").te_fp8

    def run(first):
        with torch.no_grad(), step_context(first_microbatch=first), fp8.autocast():
            return experts(*routing)

    fresh = run(None)
    assert torch.equal(run(True), fresh)
    assert torch.equal(run(False), fresh)
    with torch.no_grad():
        experts.down_proj.mul_(2)
    changed = run(False)
    assert not torch.equal(changed, fresh)
    assert torch.equal(changed, run(None))
    counts = cache_counts(model)
    assert (counts.filled, counts.reused, counts.refreshed) == (2, 3, 1)


@pytest.mark.usefixtures("classes")
def test_gradients_of_grouped_linear_are_not_copied(monkeypatch):
    model, routing = model_of("Qwen3Moe"), routed()
    expected = outputs(swapped(model, "te"), *routing)

    def copies(parts):
        raise AssertionError("gradients were copied into a stack")

    monkeypatch.setattr(_grouped.torch, "stack", copies)
    found = outputs(experts_of(model), *routing)

    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))


@families
@pytest.mark.usefixtures("classes")
def test_a_model_in_fp8_trains_as_one_in_bf16(family):
    generator = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(3, 512, (2, 64), device="cuda", generator=generator)
    losses = {}
    for recipe in (None, "current"):
        model = model_of(family)
        fields = {"te_fp8": recipe} if recipe else {}
        swapped(model, "te", **fields)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        losses[recipe] = []
        for _ in range(10):
            for first in (True, False):
                with step_context(first_microbatch=first):
                    loss = model(input_ids=ids, labels=ids).loss
                    loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[recipe].append(loss.item())

    assert losses[None][-1] < losses[None][0] - 0.5
    assert all(abs(a - b) < 0.05 * a for a, b in zip(*losses.values(), strict=True))


@families
def test_torch_mm_gives_the_same_bits_in_every_run(family):
    model, routing = model_of(family), routed(2000)
    experts = swapped(model, "torch_mm")
    first = outputs(experts, *routing)

    for _ in range(5):
        again = outputs(experts, *routing)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(again, first, strict=True))


# That the mode which looks for waiting is a prototype.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@families
def test_torch_mm_and_a_fake_gate_do_not_wait_for_the_device(family):
    model, routing = model_of(family), routed()
    experts = swapped(model, "torch_mm", swiglu="fused")
    outputs(experts, *routing)
    router = type("Router", (), {"top_k": 2, "num_experts": 8})()
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs(experts, *routing)
        even_experts(100, router, 0.5, torch.device("cuda"))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@choices
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_few_tokens_leave_most_experts_without_one(choice, num_tokens, needed):
    needed(choice)
    model, routing = model_of("Qwen3Moe"), routed(num_tokens)
    expected = exact_outputs(experts_of(model), *routing)
    found = outputs(swapped(model, choice), *routing)
    chosen = set(routing[1].flatten().tolist())

    assert max(errors(found, expected)) < 2e-2
    for expert in set(range(8)) - chosen:
        assert not found[-1][expert].any()
        assert not found[-2][expert].any()


@choices
def test_build_offers_the_same(choice, needed):
    needed(choice)
    torch.manual_seed(0)
    made = build.experts(8, 128, 64, backend=choice, device="cuda")
    other = build.experts(8, 128, 64, device="cuda", dtype="fp32").double()
    other.load_state_dict(made.state_dict())
    x, chosen, weights = routed()

    expected = other(x.double(), weights.double(), chosen)
    assert (made(x, weights, chosen) - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("top_k", "hidden"), [(1, 7), (2, 130), (8, 2048), (6, 5000)])
@pytest.mark.parametrize("multiple", [None, 16])
def test_kernels_add_up_exactly_and_round_once(dtype, weight_dtype, top_k, hidden, multiple):
    torch.manual_seed(0)
    chosen = torch.rand(50, 16, device="cuda").topk(top_k).indices
    routing = routing_of(chosen, 16, multiple)
    x = torch.randn(50, hidden, device="cuda").to(dtype)
    weights = torch.rand(50, top_k, device="cuda").to(weight_dtype)
    assert routing_kernel(x, weights, dtype).name == "triton"
    leaves = [each.clone().requires_grad_() for each in (x, weights)]
    wide = [each.double().requires_grad_() for each in (x, weights)]
    dy = torch.randn(50, hidden, device="cuda").to(dtype)

    found = combined(dispatched(leaves[0], routing), leaves[1], routing, dtype)
    exact = (wide[0][:, None] * wide[1][..., None]).sum(1)
    ours = torch.autograd.grad(found, leaves, dy)
    theirs = torch.autograd.grad(exact, wide, dy.double())
    step = torch.finfo(dtype).eps

    assert ((found - exact).abs() <= step * exact.abs() + 1e-5).all()
    # Rows' gradients are rounded once each, then their sum.
    scale = (wide[1].sum(1, keepdim=True) * dy.double().abs()).detach()
    assert ((ours[0] - theirs[0]).abs() <= 2 * step * scale + 1e-5).all()
    step = torch.finfo(weight_dtype).eps
    assert ((ours[1] - theirs[1]).abs() <= step * theirs[1].abs() + 1e-4 * hidden**0.5).all()
