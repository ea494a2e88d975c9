"""Every kind of RMSNorm that there is in transformers, against the untouched module."""

import copy
import importlib

import attrs
import pytest
import torch
from convert_families import OWN
from torch import nn

from automodel_fn import BackendConfig, apply, backend_plan
from automodel_fn.convert._norm_conventions import norm_convention

FP32 = attrs.evolve(OWN, rms_norm="torch_fp32")
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
]
PLAIN = [
    ("llama", "LlamaRMSNorm", {}),
    ("gpt_oss", "GptOssRMSNorm", {}),
    ("gemma3", "Gemma3RMSNorm", {}),
    ("qwen3_next", "Qwen3NextRMSNorm", {}),
    ("t5", "T5LayerNorm", {}),
    ("idefics", "IdeficsRMSNorm", {}),
    ("gemma4", "Gemma4RMSNorm", {}),
    ("gemma4", "Gemma4RMSNorm", {"with_scale": False}),
]
WEIGHTLESS = [
    ("nanochat", "NanoChatRMSNorm", {}),
    ("llama4", "Llama4TextL2Norm", {}),
    ("falcon_mamba", "FalconMambaWeightlessRMSNorm", {"hidden_size": 64}),
]
GATED = [
    ("qwen3_next", "Qwen3NextRMSNormGated", (64,), {}),
    ("qwen3_5", "Qwen3_5RMSNormGated", (64,), {}),
    ("kimi_linear", "KimiLinearRMSNormGated", (64,), {}),
    ("mamba2", "MambaRMSNormGated", (64, 32), {}),
    ("bamba", "BambaRMSNormGated", (64, 16), {}),
    ("zamba2", "Zamba2RMSNormGated", (64, 64), {}),
    ("falcon_h1", "FalconH1RMSNormGated", (64,), {"n_groups": 4, "norm_before_gate": True}),
    ("falcon_h1", "FalconH1RMSNormGated", (64,), {"n_groups": 4, "norm_before_gate": False}),
]
LEFT = [
    ("deepseek_v4", "DeepseekV4UnweightedRMSNorm", (), {}),
    ("xlstm", "xLSTMRMSNorm", (64,), {}),
]


def made(family, name, *sizes, **options):
    found = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(found, name)(*sizes, **options)


def holder(norm, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return nn.Sequential(norm).to(dtype)


def entry(model, backend=FP32, **options):
    (found,) = (e for e in backend_plan(model, backend, **options).entries if e.field == "rms_norm")
    return found


def numbers(norm, dtype, num_inputs):
    """The output and all gradients, of new inputs."""
    generator = torch.Generator().manual_seed(1)
    shape = (2, 5, 64)
    given = [torch.randn(shape, generator=generator).to(dtype) for _ in range(num_inputs)]
    given = [each.requires_grad_() for each in given]
    found = norm(*given)
    weights = torch.randn(found.shape, generator=generator)
    found.float().mul(weights).sum().backward()
    return [found, *(each.grad for each in (*given, *norm.parameters()))]


def assert_alike(model, dtype, num_inputs):
    expected = numbers(copy.deepcopy(model)[0], dtype, num_inputs)
    own = type(model[0])
    report = apply(backend_plan(model, FP32))
    found = numbers(model[0], dtype, num_inputs)

    assert type(model[0]) is not own
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    same = (found[0] == expected[0]).double().mean()
    assert same > 0.95 or dtype == torch.float32
    report.undo()
    assert type(model[0]) is own


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize(("family", "name", "options"), PLAIN)
def test_a_norm_computes_what_its_own_code_does(family, name, options, dtype, weight_dtype):
    assert_alike(holder(made(family, name, 64, **options), weight_dtype), dtype, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("family", "name", "options"), WEIGHTLESS)
def test_a_norm_without_a_weight_computes_what_its_own_code_does(family, name, options, dtype):
    assert_alike(holder(made(family, name, **options)), dtype, 1)


@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize(("family", "name", "sizes", "options"), GATED)
def test_a_gated_norm_computes_what_its_own_code_does(
    family, name, sizes, options, dtype, weight_dtype
):
    assert_alike(holder(made(family, name, *sizes, **options), weight_dtype), dtype, 2)


@pytest.mark.parametrize(("family", "name"), [("mamba2", "MambaRMSNormGated")])
def test_a_gated_norm_may_be_given_no_gate(family, name):
    assert_alike(holder(made(family, name, 64, 32)), torch.float32, 1)


class OwnRMSNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(64)), 1e-5

    def normed(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class OptionallyGatedRMSNorm(OwnRMSNorm):
    """As that of Mamba 2 in transformers 5.17: without groups, and without a gate a plain norm."""

    def forward(self, x, gate=None):
        wide = x.float()
        if gate is not None:
            wide = wide * nn.functional.silu(gate.float())
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class OptionallyScaledRMSNorm(OwnRMSNorm):
    def forward(self, x, scale=None):
        return self.normed(x) if scale is None else self.normed(x) * scale


@pytest.mark.parametrize("num_inputs", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gate_that_may_be_left_out_and_has_no_groups_is_a_gate(dtype, num_inputs):
    assert_alike(holder(OptionallyGatedRMSNorm(), dtype), dtype, num_inputs)


def test_a_norm_that_takes_more_than_its_input_is_no_plain_one():
    found = entry(holder(OptionallyScaledRMSNorm()))

    assert found.action == "skip"
    assert "none of the RMSNorms that are known here" in found.reason


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@pytest.mark.parametrize(("dtype", "weight_dtype"), DTYPES)
@pytest.mark.parametrize("is_weighted", [True, False])
def test_pytorchs_own_norm_computes_what_it_did(is_weighted, dtype, weight_dtype):
    norm = nn.RMSNorm(64, eps=1e-5, elementwise_affine=is_weighted)

    assert_alike(holder(norm, weight_dtype), dtype, 1)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (nn.RMSNorm(64), "its eps is None"),
        (nn.RMSNorm((8, 64), eps=1e-5), "it norms over 2 dimensions"),
        (made("qwen4_exp", "Qwen4ExpTextRMSNorm", 64, 16), "it norms groups of 16"),
        (made("qwen4_exp", "Qwen4ExpTextRMSNormGated", 64, activation="gelu"), "its gate goes"),
        *((made(family, name, *sizes), "tried on a few") for family, name, sizes, _ in LEFT),
    ],
)
def test_what_is_computed_otherwise_stays_with_a_reason(norm, reason):
    found = entry(holder(norm))

    assert found.action == "skip"
    assert found.reason.startswith(reason)


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        (made("nanochat", "NanoChatRMSNorm"), "Transformer Engine has no RMSNorm without a weight"),
        (made("mamba2", "MambaRMSNormGated", 64, 32), "Transformer Engine has no RMSNorm with a"),
        (nn.RMSNorm(64, eps=1e-5), "it is PyTorch's own; build.rms_norm"),
    ],
)
def test_what_transformer_engine_has_not_is_said(norm, reason, gpu):
    asked = BackendConfig(attn="sdpa", linear="torch", rms_norm="te")
    found = entry(nn.Sequential(norm), asked, availability=gpu)

    assert found.action == "skip"
    assert found.reason.startswith(reason)


def test_of_one_class_some_may_have_a_weight_and_others_not():
    norm = type(made("gemma4", "Gemma4RMSNorm", 8))

    assert norm_convention(norm, True).multiply == "fp32"
    assert norm_convention(norm, False).multiply == "none"


def test_a_layer_norm_is_no_candidate():
    plan = backend_plan(nn.Sequential(nn.LayerNorm(8), nn.Identity(), nn.Dropout()), FP32)

    assert "rms_norm" not in {each.field for each in plan.entries}


@pytest.mark.parametrize(
    ("family", "name", "sizes", "options"),
    [*GATED[:4], *GATED[-2:], ("gemma4", "Gemma4RMSNorm", (64,), {"with_scale": False})],
)
def test_a_norm_is_compiled_whole(family, name, sizes, options):
    model = holder(made(family, name, *sizes, **options))
    apply(backend_plan(model, FP32))
    compiled = torch.compile(model[0], backend="aot_eager", fullgraph=True)
    given = [torch.randn(2, 5, 64) for _ in range(1 if family == "gemma4" else 2)]

    torch.testing.assert_close(compiled(*given), model[0](*given))
