import copy
import sys
import types

import pytest
import torch
from torch.nn import functional as F

from automodel_fn import BackendUnavailableError, ConfigError, build


def dense(made, x, weights, chosen):
    """Every expert for every token, in float64, and then only what was chosen."""
    gate_up = torch.einsum("th,eih->tei", x.double(), made.gate_up_proj.double())
    gate, up = gate_up.chunk(2, -1)
    found = torch.einsum("tef,ehf->teh", F.silu(gate) * up, made.down_proj.double())
    picked = found.gather(1, chosen[..., None].expand(-1, -1, found.shape[-1]))
    return (picked * weights[..., None].double()).sum(1)


@pytest.fixture
def routed():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20, 32, generator=generator)
    weights = torch.rand(20, 2, generator=generator)
    # The last expert has no token.
    chosen = torch.rand(20, 5, generator=generator).topk(2).indices
    return x, weights, chosen


@pytest.mark.parametrize("backend", ["torch", "torch_mm"])
@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_each_token_goes_through_its_experts(routed, backend, dtype, tolerance):
    torch.manual_seed(1)
    made = build.experts(6, 32, 16, backend=backend, dtype=dtype)
    x, weights, chosen = routed
    x = x.to(made.down_proj.dtype)
    found = made(x, weights.to(x.dtype), chosen)
    expected = dense(made, x, weights.to(x.dtype), chosen)

    assert found.dtype == x.dtype
    assert (found - expected).abs().max() < tolerance * expected.abs().max()


@pytest.mark.parametrize("backend", ["torch", "torch_mm"])
def test_gradients_reach_tokens_weights_and_experts(routed, backend):
    torch.manual_seed(1)
    made = build.experts(6, 32, 16, backend=backend, dtype="fp32")
    x, weights, chosen = (each.clone() for each in routed)
    x.requires_grad_(), weights.requires_grad_()
    sources = (x, weights, made.gate_up_proj, made.down_proj)
    found = torch.autograd.grad(made(x, weights, chosen).square().sum(), sources)
    expected = torch.autograd.grad(dense(made, x, weights, chosen).square().sum(), sources)

    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_experts_of_transformer_engine_compute_the_same(routed, classes, monkeypatch):
    monkeypatch.setattr(
        classes.grouped_linear, "quantized", lambda self, name, _, dtype: getattr(self, name)
    )
    made = build.experts(6, 32, 16, backend="te", dtype="fp32")
    x, weights, chosen = (each.clone() for each in routed)
    x.requires_grad_(), weights.requires_grad_()
    sources = (x, weights, made.gate_up_proj, made.down_proj)
    found, expected = made(x, weights, chosen), dense(made, x, weights, chosen)
    ours = torch.autograd.grad(found.sum(), sources)

    assert list(made.state_dict()) == ["gate_up_proj", "down_proj"]
    assert torch.equal(copy.deepcopy(made)(x, weights, chosen), found)
    for left, right in zip(ours, torch.autograd.grad(expected.sum(), sources), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5)


def test_experts_by_grouped_gemm_compute_the_same(routed, monkeypatch):
    def gmm(a, b, batch_sizes, trans_b):
        parts = zip(a.split(batch_sizes.tolist()), b.mT if trans_b else b, strict=True)
        return torch.cat([part @ weight for part, weight in parts])

    package = types.ModuleType("grouped_gemm.ops")
    package.gmm = gmm
    monkeypatch.setitem(sys.modules, "grouped_gemm", types.ModuleType("grouped_gemm"))
    monkeypatch.setitem(sys.modules, "grouped_gemm.ops", package)
    made, (x, weights, chosen) = build.experts(6, 32, 16, backend="gmm"), routed
    x, weights = x.bfloat16(), weights.bfloat16()
    expected = dense(made, x, weights, chosen)

    assert (made(x, weights, chosen) - expected).abs().max() < 2e-2 * expected.abs().max()


@pytest.mark.usefixtures("no_transformer_engine")
@pytest.mark.parametrize(
    ("backend", "said"), [("te", "Transformer Engine"), ("gmm", "pip install grouped_gemm")]
)
def test_experts_of_a_package_that_is_missing_are_an_error(backend, said):
    with pytest.raises(BackendUnavailableError, match=said):
        build.experts(4, 8, 16, backend=backend)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@pytest.mark.parametrize("norm_top_k", [True, False])
def test_a_gate_takes_the_best_and_says_how_much(score, norm_top_k):
    torch.manual_seed(0)
    made = build.gate(8, 6, top_k=2, score=score, norm_top_k=norm_top_k, dtype="fp32")
    x = torch.randn(5, 8)
    weights, chosen = made(x)
    logits = x.double() @ made.weight.double().T
    scores = logits.softmax(-1) if score == "softmax" else logits.sigmoid()
    expected, order = scores.sort(-1, descending=True)
    expected = expected[:, :2] / (expected[:, :2].sum(-1, keepdim=True) if norm_top_k else 1)

    assert torch.equal(chosen, order[:, :2])
    torch.testing.assert_close(weights.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("precision", "logits"), [(None, torch.bfloat16), ("fp32", torch.float32)])
def test_a_gate_projects_in_its_precision(monkeypatch, precision, logits):
    seen = []
    own = F.linear

    def linear(x, weight):
        seen.append((x.dtype, weight.dtype))
        return own(x, weight)

    monkeypatch.setattr(F, "linear", linear)
    made = build.gate(8, 6, top_k=2, precision=precision)
    weights, _ = made(torch.randn(5, 8).bfloat16())

    assert seen == [(logits, logits)]
    assert weights.dtype == torch.bfloat16


@pytest.mark.parametrize(
    "made",
    [
        lambda device: build.gate(8, 4, top_k=2, device=device, dtype="fp32"),
        lambda device: build.experts(4, 8, 16, device=device, dtype="fp32"),
    ],
)
def test_made_on_meta_it_is_filled_by_reset_parameters(made, filled):
    torch.manual_seed(3)
    expected = made("cpu").state_dict()
    found = filled(made("meta"), seed=3).state_dict()

    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        build.gate(0, 4, top_k=5, score="tanh")
    said = str(caught.value)
    assert all(text in said for text in ("dim=0", "top_k=5 must be at most", "score='tanh'"))
    with pytest.raises(ConfigError, match=r"backend='torch_m'.*did you mean 'torch_mm'"):
        build.experts(4, 8, 16, backend="torch_m")
