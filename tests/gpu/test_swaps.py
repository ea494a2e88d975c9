import copy
import importlib

import attrs
import pytest
import torch
import transformers

from automodel_fn import BackendConfig, apply, backend_plan, step_context

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Compilers, flex attention and Transformer Engine warn of what they and their like do.
    pytest.mark.filterwarnings("ignore"),
]

OWN = BackendConfig(
    attn="sdpa",
    linear="torch",
    rms_norm="torch",
    rope_fusion=False,
    async_masks=False,
    swiglu="torch",
    loss="torch",
)
FUSED = {
    "rms_norm": "torch_fp32",
    "rope_fusion": True,
    "async_masks": True,
    "swiglu": "fused",
    "loss": "fused",
}
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "vocab_size": 512,
}


def model_of(family, dtype):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**SIZES)
    with torch.device("cuda"):
        return getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).train()


def loss_and_gradients(model):
    generator = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(0, 512, (2, 64), device="cuda", generator=generator)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return loss.detach(), gradients


def assert_alike(model, backend, tolerance, slack):
    """In float32, near what the own model computes.

    In bf16 no further from its float32 than twice what the own one is, and what tokens make that a
    rounding sends to another expert.
    """
    exact_loss, exact = loss_and_gradients(copy.deepcopy(model).float())
    expected, gradients = loss_and_gradients(model)
    keys = list(model.state_dict())
    report = apply(backend_plan(model, backend))
    assert report.num_swaps
    found, ours = loss_and_gradients(model)

    assert list(model.state_dict()) == keys
    assert abs(found - exact_loss) < tolerance * abs(exact_loss)
    for name, gradient in exact.items():
        error, own_error = ((each[name].float() - gradient).norm() for each in (ours, gradients))
        assert error < 2 * own_error + slack * gradient.norm() + 1e-5, name
    report.undo()
    again, _ = loss_and_gradients(model)
    assert abs(again - expected) < 1e-3 * abs(expected)


@pytest.mark.parametrize("family", ["Llama", "Qwen3Moe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "fields", [FUSED, {"attn": "eager"}, {"attn": "flex"}, {"compile_attn": True}]
)
def test_a_swapped_model_computes_what_the_own_one_does(family, dtype, fields):
    tolerance, slack = (5e-5, 5e-6) if dtype == torch.float32 else (5e-2, 5e-3)
    if family == "Qwen3Moe" and dtype == torch.bfloat16:
        slack = 0.1
    assert_alike(model_of(family, dtype), attrs.evolve(OWN, **fields), tolerance, slack)


@pytest.mark.usefixtures("classes")
@pytest.mark.parametrize(
    "fields", [{"linear": "te"}, {"rms_norm": "te"}, {"attn": "te"}, {**FUSED, "linear": "te"}]
)
def test_modules_of_transformer_engine_compute_what_the_own_ones_do(fields):
    assert_alike(model_of("Llama", torch.bfloat16), attrs.evolve(OWN, **fields), 5e-2, 5e-3)


@pytest.mark.usefixtures("classes")
def test_in_fp8_the_loss_is_near_and_so_it_is_with_recomputes_and_kept_weights():
    model = model_of("Llama", torch.bfloat16)
    expected, _ = loss_and_gradients(model)
    apply(backend_plan(model, attrs.evolve(OWN, **FUSED, linear="te", te_fp8="current")))
    first, gradients = loss_and_gradients(model)

    assert abs(first - expected) < 0.05 * abs(expected)
    model.gradient_checkpointing_enable()
    for is_first in (True, False):
        with step_context(first_microbatch=is_first):
            again, recomputed = loss_and_gradients(model)
        assert abs(again - first) < 1e-3 * abs(first)
        for name, gradient in gradients.items():
            error = (recomputed[name].float() - gradient.float()).norm()
            assert error < 2e-2 * gradient.float().norm() + 1e-5, name


@pytest.mark.parametrize("loss", ["torch", "fused"])
@pytest.mark.parametrize("precision", ["fp32", "bf16x3"])
def test_a_head_in_a_precision_gives_the_loss_of_float32_products(precision, loss):
    model = model_of("Llama", torch.bfloat16)
    model.lm_head.float()
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    generator = torch.Generator("cuda").manual_seed(1)
    ids = torch.randint(0, 512, (2, 64), device="cuda", generator=generator)
    with torch.no_grad():
        hidden = model.model(input_ids=ids)[0].double()
        logits = hidden @ model.lm_head.weight.double().T
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    report = apply(backend_plan(model, attrs.evolve(OWN, lm_head_precision=precision, loss=loss)))
    for _ in range(2):
        found = model(input_ids=ids, labels=ids).loss
        found.backward()
        assert abs(found.double() - expected) < 1e-5 * expected
    assert model.lm_head.weight.grad.dtype == torch.float32
    report.undo()
    assert type(model.lm_head) is torch.nn.Linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("family", "name", "sizes", "num_inputs"),
    [
        ("t5", "T5LayerNorm", (128,), 1),
        ("nanochat", "NanoChatRMSNorm", (), 1),
        ("qwen3_next", "Qwen3NextRMSNormGated", (128,), 2),
        ("kimi_linear", "KimiLinearRMSNormGated", (128,), 2),
        ("mamba2", "MambaRMSNormGated", (128, 32), 2),
    ],
)
def test_norms_of_every_kind_compute_what_their_own_code_does(
    family, name, sizes, num_inputs, dtype
):
    found = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    with torch.device("cuda"):
        model = torch.nn.Sequential(getattr(found, name)(*sizes)).to(dtype)
        given = [torch.randn(2, 64, 128, dtype=dtype).requires_grad_() for _ in range(num_inputs)]
        weights = torch.randn(2, 64, 128, dtype=dtype)
    wanted = [*given, *model.parameters()]

    def numbers():
        made = model[0](*given)
        return [made, *torch.autograd.grad(made, wanted, weights)]

    expected = numbers()
    assert apply(backend_plan(model, attrs.evolve(OWN, rms_norm="torch_fp32"))).num_swaps == 1
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(numbers(), expected, strict=True):
        assert ours.dtype == theirs.dtype
        error = (ours.float() - theirs.float()).norm()
        assert error < tolerance * theirs.float().norm()
