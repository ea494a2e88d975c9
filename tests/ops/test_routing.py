import pytest
import torch
from torch.nn import functional as F

from automodel_fn.ops._experts import OneByOne, Stacked, TorchMM, through_experts
from automodel_fn.ops._routing import (
    bias_of_rows,
    combined,
    dispatched,
    routing_kernel,
    routing_of,
)

SIZES = ((5, 2, 4), (1, 1, 3), (40, 3, 7), (9, 8, 8), (0, 2, 4))
sizes = pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), SIZES)
multiples = pytest.mark.parametrize("multiple", [None, 1, 4, 16])


def chosen_of(num_tokens, top_k, num_experts):
    # Without the last expert, where there are others to choose from.
    scores = torch.rand(num_tokens, max(top_k, num_experts - 1))
    return scores.topk(top_k).indices


@sizes
@multiples
def test_rows_lie_by_expert_and_each_token_finds_its_own(num_tokens, top_k, num_experts, multiple):
    chosen = chosen_of(num_tokens, top_k, num_experts)
    routing = routing_of(chosen, num_experts, multiple)
    at = 0
    for expert in range(num_experts):
        tokens = [t for t in range(num_tokens) if expert in chosen[t].tolist()]
        filled = tokens + tokens[-1:] * (-len(tokens) % (multiple or 1))
        assert routing.tokens[at : at + len(filled)].tolist() == filled
        assert routing.experts[at : at + len(filled)].tolist() == [expert] * len(filled)
        assert multiple is None or routing.splits[expert] == len(filled)
        at += len(filled)
        assert routing.ends[expert] == at
    assert at == len(routing.tokens)
    assert routing.ends.dtype == torch.int32
    for t in range(num_tokens):
        for k in range(top_k):
            place = routing.places[t, k]
            assert (routing.tokens[place], routing.experts[place]) == (t, chosen[t, k])


@sizes
@multiples
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_there_and_back_is_a_weighted_sum(num_tokens, top_k, num_experts, multiple, dtype):
    routing = routing_of(chosen_of(num_tokens, top_k, num_experts), num_experts, multiple)
    x, weights = torch.randn(num_tokens, 6).to(dtype), torch.rand(num_tokens, top_k).to(dtype)
    x.requires_grad_(), weights.requires_grad_()
    found = combined(dispatched(x, routing), weights, routing, dtype)
    wide = [each.detach().double().requires_grad_() for each in (x, weights)]
    expected = (wide[0][:, None] * wide[1][..., None]).sum(1)
    dy = torch.randn(found.shape)
    gradients = torch.autograd.grad(found, (x, weights), dy.to(dtype))
    exact = torch.autograd.grad(expected, wide, dy.to(dtype).double())

    assert torch.equal(found, combined(x.detach()[routing.tokens], weights, routing, dtype))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, theirs in zip((found, *gradients), (expected, *exact), strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def test_a_sum_is_rounded_once():
    routing = routing_of(torch.arange(8).expand(64, 8), 8)
    rows, weights = torch.randn(512, 16).bfloat16(), torch.rand(64, 8).bfloat16()
    found = combined(rows, weights, routing, torch.bfloat16)
    taken = rows[routing.places].double()

    assert torch.equal(found, (taken * weights[..., None].double()).sum(1).float().bfloat16())


def test_gradients_are_computed_in_float32_and_rounded_once():
    routing = routing_of(torch.rand(64, 8).argsort(-1), 8, 16)
    rows, weights = torch.randn(512, 16).bfloat16(), torch.rand(64, 8)
    leaves = [each.requires_grad_() for each in (rows, weights)]
    dy = torch.randn(64, 16).bfloat16()
    found = combined(*leaves, routing, torch.bfloat16)
    drows, dweights = torch.autograd.grad(found, leaves, dy)
    exact = dy.double()[:, None] * weights.detach().double()[..., None]
    products = rows.detach().double()[routing.places] * dy.double()[:, None]

    assert torch.equal(drows[routing.places], exact.float().bfloat16())
    torch.testing.assert_close(dweights.double(), products.sum(-1), rtol=1e-6, atol=1e-5)


def test_what_fills_up_has_no_gradient():
    routing = routing_of(torch.tensor([[0], [0], [1]]), 2, 4)
    rows = torch.randn(8, 3, requires_grad=True)
    combined(rows, torch.ones(3, 1), routing, torch.float32).sum().backward()

    assert rows.grad.any(-1).tolist() == [True, True, False, False, True, False, False, False]


def test_weights_or_rows_may_need_no_gradient():
    routing = routing_of(torch.tensor([[0, 1]]), 2)
    rows, weights = torch.randn(2, 3), torch.rand(1, 2)
    for needed in ((True, False), (False, True)):
        tensors = [
            t.clone().requires_grad_(n) for t, n in zip((rows, weights), needed, strict=True)
        ]
        combined(*tensors, routing, torch.float32).sum().backward()
        assert [tensor.grad is not None for tensor in tensors] == list(needed)


def test_the_gradient_of_a_bias_is_the_sum_over_its_rows():
    routing = routing_of(torch.tensor([[3], [0], [3], [1]]), 5)
    bias = torch.randn(5, 3, requires_grad=True)
    dy = torch.randn(4, 3)
    (found,) = torch.autograd.grad(bias_of_rows(bias, routing), bias, dy)
    (expected,) = torch.autograd.grad(bias[routing.experts], bias, dy)

    torch.testing.assert_close(found, expected)


def layers_of(dtype=torch.float32, device="cpu"):
    return tuple(
        Stacked(torch.randn(4, 8, 8, device=device).to(dtype), name=name) for name in ("up", "down")
    )


@pytest.mark.parametrize("product", [TorchMM(), OneByOne()])
def test_under_autocast_it_computes_in_its_dtype(product):
    layers, x, chosen = layers_of(), torch.randn(5, 8), torch.rand(5, 4).topk(2).indices
    weights = torch.rand(5, 2)
    narrow = tuple(layer._replace(weight=layer.weight.bfloat16()) for layer in layers)
    expected = through_experts(
        x.bfloat16(), chosen, weights, product=product, layers=narrow, gate=F.relu
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = through_experts(x, chosen, weights, product=product, layers=layers, gate=F.relu)

    assert found.dtype == torch.float32
    assert torch.equal(found.bfloat16(), expected)


def test_nothing_waits_for_the_device_with_grouped_products():
    layers = layers_of(torch.bfloat16, "meta")
    x = torch.empty(5, 8, device="meta", dtype=torch.bfloat16, requires_grad=True)
    chosen = torch.empty(5, 2, device="meta", dtype=torch.int64)
    weights = torch.empty(5, 2, device="meta", requires_grad=True)
    # Of a meta tensor nothing can be read.
    found = through_experts(x, chosen, weights, product=TorchMM(), layers=layers, gate=F.relu)
    found.sum().backward()

    assert found.shape == x.grad.shape == (5, 8)
    assert weights.grad.shape == (5, 2)


def test_what_adds_up_is_said():
    rows = torch.ones(2, 2)

    assert routing_kernel(rows, None, torch.float64).reason == "the result is torch.float64"
    assert routing_kernel(rows, rows, torch.float32).reason == "rows is on cpu"
