import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from automodel_fn.ops import _recomputed
from automodel_fn.ops._recomputed import recomputed_swiglu
from automodel_fn.ops._swiglu import swiglu


def made(dtype=torch.bfloat16, shape=(3, 5, 16)):
    gate, up = (torch.randn(shape).to(dtype).requires_grad_() for _ in range(2))
    return nn.Linear(shape[-1], 8, dtype=dtype), gate, up


@pytest.fixture
def products(monkeypatch):
    """How often the product was computed, and the tensors that it gave."""
    found = []

    def noted(gate, up):
        y = swiglu(gate, up)
        found.append((weakref.ref(y), torch.is_grad_enabled()))
        return y

    monkeypatch.setattr(_recomputed, "swiglu", noted)
    return found


def gradients(function, layer, gate, up):
    layer = copy.deepcopy(layer)
    leaves = [each.detach().clone().requires_grad_() for each in (gate, up)]
    out = function(layer, *leaves)
    dy = torch.ones_like(out).cumsum(0)
    return [out, *torch.autograd.grad(out, [*leaves, *layer.parameters()], dy)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_outputs_and_gradients_have_the_bits_of_keeping(dtype):
    layer, gate, up = made(dtype)
    found = gradients(recomputed_swiglu, layer, gate, up)
    expected = gradients(lambda layer, gate, up: layer(swiglu(gate, up)), layer, gate, up)

    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


def test_the_product_is_gone_between_forward_and_backward(products):
    layer, gate, up = made()
    out = recomputed_swiglu(layer, gate, up)
    gc.collect()

    assert [each() for each, _ in products] == [None]
    out.sum().backward()
    assert [is_on for _, is_on in products] == [True, False]


def test_what_is_saved_of_the_product_in_another_shape_is_given_back_in_it():
    _, gate, up = made(shape=(4, 6))
    weight = torch.randn(4, 3).bfloat16().requires_grad_()

    def taken_apart(y):
        return (y[:, 1:5] @ weight).t() @ y.view(2, 12)[:, 2:7].t().repeat(1, 2)[:4]

    out = recomputed_swiglu(taken_apart, gate, up)
    found = torch.autograd.grad(out, [gate, up, weight], torch.ones_like(out))
    again = taken_apart(swiglu(gate, up))
    expected = torch.autograd.grad(again, [gate, up, weight], torch.ones_like(out))

    assert torch.equal(out, again)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


def test_what_is_not_the_product_is_kept(products):
    layer, gate, up = made()
    out = recomputed_swiglu(lambda y: layer(y * 2), gate, up)
    out.sum().backward()

    assert len(products) == 1


def test_a_product_that_was_changed_in_place_is_kept(products):
    layer, gate, up = made()
    out = recomputed_swiglu(lambda y: layer(y.mul_(2)), gate, up)
    found = torch.autograd.grad(out, layer.weight, torch.ones_like(out))
    expected = layer(swiglu(gate, up) * 2)

    assert len(products) == 1
    assert torch.equal(
        found[0], torch.autograd.grad(expected, layer.weight, torch.ones_like(out))[0]
    )


def test_the_memory_of_the_product_as_another_dtype_is_kept(products):
    _, gate, up = made(shape=(4, 6))
    weight = torch.randn(6, 3).half().requires_grad_()
    recomputed_swiglu(lambda y: y.view(torch.float16) @ weight, gate, up).sum().backward()
    expected = swiglu(gate, up).detach().view(torch.float16).t() @ torch.ones(4, 3).half()

    assert len(products) == 1
    assert torch.equal(weight.grad, expected)


def test_second_derivatives_have_the_bits_of_keeping():
    layer, gate, up = made(torch.float64)
    found = []
    for function in (recomputed_swiglu, lambda layer, gate, up: layer(swiglu(gate, up))):
        inputs = (gate, up, layer.weight)
        first = torch.autograd.grad(
            function(layer, gate, up).square().sum(), inputs, create_graph=True
        )
        found.append(torch.autograd.grad(sum(each.square().sum() for each in first), inputs))

    for left, right in zip(*found, strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize("watching", [FlopCounterMode(display=False), FakeTensorMode()])
def test_where_somebody_watches_the_product_is_kept(products, watching):
    with watching:
        layer, gate, up = made()
        recomputed_swiglu(layer, gate, up).sum().backward()

    assert len(products) == 1


@pytest.mark.parametrize("which", ["gate", "up"])
def test_a_gate_or_up_that_was_changed_since_is_an_error(which):
    layer, *both = made()
    # Autograd's own check of what it keeps comes later, with the gradient of the product.
    out = recomputed_swiglu(layer, *both)
    with torch.no_grad():
        both[which == "up"].mul_(2)

    with pytest.raises(RuntimeError, match="was changed in place"):
        out.sum().backward()


def test_without_gradients_of_the_product_nothing_is_computed_twice(products):
    layer, gate, up = made()
    with torch.no_grad():
        recomputed_swiglu(layer, gate, up)
    recomputed_swiglu(layer, gate.detach(), up.detach()).sum().backward()

    assert len(products) == 2
    assert products[1][0]() is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing_keeps_what_it_keeps_without(use_reentrant, products):
    layer, gate, up = made()
    out = checkpoint(recomputed_swiglu, layer, gate, up, use_reentrant=use_reentrant)
    out.sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x):
        recomputed_swiglu(layer, gate, up).sum().backward()

    # Reentrant ones have no hooks in the recompute, which is a forward of its own.
    assert len(products) == (4 if use_reentrant else 3)


def test_compiled_it_is_the_product_that_is_kept():
    layer, gate, up = made(torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(recomputed_swiglu, fullgraph=True, backend="aot_eager")
    found = gradients(lambda layer, gate, up: compiled(layer, gate, up), layer, gate, up)
    expected = gradients(lambda layer, gate, up: layer(swiglu(gate, up)), layer, gate, up)

    for left, right in zip(found, expected, strict=True):
        assert torch.allclose(left, right)
