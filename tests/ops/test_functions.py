"""Autograd functions that cost the host little, beside PyTorch's own."""

import pytest
import torch
from torch.autograd.function import once_differentiable

from automodel_fn.ops._functions import differentiable_once, plain_apply


def squared(decorate, seen):
    class Squared(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, scale):
            ctx.save_for_backward(x)
            ctx.scale = scale
            return scale * x * x

        @staticmethod
        @decorate
        def backward(ctx, dy):
            seen.append(torch.is_grad_enabled())
            return 2 * ctx.scale * dy * ctx.saved_tensors[0], None

    return Squared


def test_applied_plainly_a_function_is_itself():
    function = squared(differentiable_once, [])
    x = torch.randn(3, requires_grad=True)
    own, found = function.apply(x, 3.0), plain_apply(function)(x, 3.0)

    assert torch.equal(own, found)
    assert type(own.grad_fn) is type(found.grad_fn)
    assert torch.equal(*(torch.autograd.grad(y.sum(), x)[0] for y in (own, found)))
    assert not plain_apply(function)(x.detach(), 3.0).requires_grad


@pytest.mark.parametrize("decorate", [differentiable_once, once_differentiable])
def test_gradients_are_off_in_its_backward(decorate):
    seen = []
    x = torch.randn(3, requires_grad=True)
    for create_graph in (False, True):
        y = squared(decorate, seen).apply(x, 3.0)
        torch.autograd.grad(y.sum(), x, create_graph=create_graph)

    assert seen == [False, False]


@pytest.mark.parametrize("decorate", [differentiable_once, once_differentiable])
def test_its_gradients_raise_where_they_are_differentiated_again(decorate):
    x = torch.randn(3, requires_grad=True)
    y, dy = squared(decorate, []).apply(x, 3.0), torch.ones(3, requires_grad=True)
    (gradient,) = torch.autograd.grad(y, x, dy, create_graph=True)

    assert torch.equal(gradient, 6 * x)
    with pytest.raises(RuntimeError, match="twice"):
        gradient.sum().backward()
