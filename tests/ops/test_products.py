"""The products of parts, on the CPU, where they are the same sums of the same products."""

import pytest
import torch

from automodel_fn.ops import _weight_parts
from automodel_fn.ops._logits_operator import logits_operator
from automodel_fn.ops._products import (
    hidden_gradient,
    logits_by_parts,
    logits_by_splitting,
    multiply_,
    weight_gradient,
)
from automodel_fn.ops._weight_parts import weight_parts

T, H, V = 37, 48, 211
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
stored = pytest.mark.parametrize("stored", DTYPES)
of_grad = pytest.mark.parametrize("of_grad", DTYPES)
# Of a result that is rounded to a dtype, and of the sums of its products.
ROUNDING = {torch.float32: 2e-7, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}


@pytest.fixture(autouse=True, params=[2**26, 20 * H], ids=["one chunk", "chunks"])
def _chunks(request, monkeypatch):
    monkeypatch.setattr(_weight_parts, "_NUMBERS_AT_ONCE", request.param)


def made(stored, of_grad=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(T, H, generator=generator).bfloat16()
    weight = (torch.randn(V, H, generator=generator) * 0.02).to(stored)
    # Gradients of a mean loss: small, and of many sizes.
    grad = torch.randn(T, V, generator=generator).mul(3).softmax(1) / T
    return hidden, weight, grad.to(of_grad)


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


PRODUCTS = [
    (torch.bfloat16, torch.float32, True),
    (torch.float16, torch.float32, True),
    (torch.bfloat16, torch.bfloat16, False),
    (torch.float32, torch.float32, True),
    (torch.float64, torch.float64, True),
    (torch.float32, torch.bfloat16, False),
    (torch.float64, torch.float32, False),
]


@pytest.mark.parametrize(("dtype", "of_total", "can_add"), PRODUCTS)
def test_a_product_is_rounded_once_and_added_in_the_dtype_of_its_total(dtype, of_total, can_add):
    # Whole numbers: sums of them are exact in float32, in any order.
    generator = torch.Generator().manual_seed(0)
    left = torch.randint(-99, 99, (5, 70), generator=generator).to(dtype)
    right = torch.randint(-99, 99, (70, 3), generator=generator).to(dtype)
    exact = left.double() @ right.double()
    assert (exact.abs() > 2**8).any()
    total = torch.full((5, 9), torch.nan, dtype=of_total)
    multiply_(total[:, 3:6], left, right)
    assert torch.equal(total[:, 3:6], exact.to(of_total))
    assert total.isnan().sum() == 30
    if can_add:
        multiply_(total[:, 3:6], left, right, is_added=True)
        assert torch.equal(total[:, 3:6], (2 * exact).to(of_total))


@stored
def test_logits_of_parts_are_those_of_the_whole_weight(stored):
    hidden, weight, _ = made(stored)
    exact = hidden.double() @ weight.double().T
    found, is_exact = logits_by_splitting(hidden, weight)

    assert found.dtype == torch.float32
    assert is_exact
    assert error(found, exact) < ROUNDING[torch.float32]
    assert error(logits_by_parts(hidden, weight_parts(weight)), exact) < ROUNDING[torch.float32]


def test_a_weight_without_exact_parts_is_told_after_the_products():
    hidden, weight, _ = made(torch.float32)
    weight[-1, -1] = 1e-40

    assert not logits_by_splitting(hidden, weight)[1]


@of_grad
@stored
def test_the_gradient_of_hidden_states_is_rounded_to_bf16_and_loses_nothing_else(stored, of_grad):
    _, weight, grad = made(stored, of_grad)
    exact = grad.double() @ weight.double()
    rounded = exact.bfloat16()
    for factor in (weight, weight_parts(weight)):
        found = hidden_gradient(grad, factor)
        # Of 1776 numbers a few lie so near to the middle of two that 2**-16 of a term decides.
        assert (found != rounded).sum() < 20
        assert error(found, exact) < ROUNDING[torch.bfloat16]


@of_grad
@stored
def test_the_gradient_of_the_weight_is_that_of_its_dtype(stored, of_grad):
    hidden, _, grad = made(stored, of_grad)
    exact = grad.double().T @ hidden.double()
    found = weight_gradient(grad, hidden, stored)

    assert found.dtype == stored
    assert error(found, exact.to(stored).double()) < ROUNDING[stored]
    assert error(found, exact) < max(ROUNDING[stored], ROUNDING[torch.float32])


def test_gradients_of_other_strides_are_those_of_contiguous_ones():
    hidden, weight, grad = made(torch.float32)
    expanded = torch.ones(T, 1).expand(T, V)
    for strided in (grad.t().contiguous().t(), grad.repeat(1, 2)[:, ::2][:, :V], expanded):
        plain = strided.contiguous()
        left = hidden_gradient(strided, weight), weight_gradient(strided, hidden, weight.dtype)
        right = hidden_gradient(plain, weight), weight_gradient(plain, hidden, weight.dtype)
        assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 3.4e38])
def test_a_gradient_that_is_not_finite_is_noticed_in_all_that_it_reaches(number):
    hidden, weight, grad = made(torch.float32)
    grad[3, 7] = number
    of_hidden, of_weight = hidden_gradient(grad, weight), weight_gradient(grad, hidden, grad.dtype)

    assert torch.equal(~of_hidden.isfinite().any(1), torch.arange(T) == 3)
    assert torch.equal(~of_weight.isfinite().any(1), torch.arange(V) == 7)


@pytest.mark.parametrize("mode", ["fp32", "bf16", "parts", "split"])
@stored
def test_every_way_of_the_operator_is_off_by_its_roundings_only(stored, mode):
    hidden, weight, _ = made(stored)
    bias = torch.linspace(-1, 1, V).to(stored).requires_grad_()
    hidden.requires_grad_()
    weight.requires_grad_()
    stacked = weight_parts(weight).stacked if mode == "parts" else None
    logits, is_bf16 = logits_operator(hidden, weight, bias, stacked, mode, torch.float32)
    grad = torch.randn(T, V, generator=torch.Generator().manual_seed(1))
    logits.backward(grad)

    factor = (weight.detach().bfloat16() if mode == "bf16" else weight.detach()).double()
    seen = (grad.bfloat16() if mode == "bf16" else grad).double()
    assert is_bf16.item() == (mode != "fp32")
    assert error(logits.detach(), hidden.detach().double() @ factor.T + bias.detach()) < 3e-7
    assert error(hidden.grad, seen @ factor) < ROUNDING[torch.bfloat16]
    assert error(weight.grad, seen.T @ hidden.detach().double()) < ROUNDING[stored]
    assert error(bias.grad, grad.double().sum(0)) < ROUNDING[stored]
    assert weight.grad.dtype == bias.grad.dtype == stored


def test_where_the_parts_are_not_exact_forward_and_backward_are_float32():
    hidden, weight, _ = made(torch.float32)
    weight = weight * 2.0**-120
    hidden.requires_grad_()
    weight.requires_grad_()
    logits, is_bf16 = logits_operator(hidden, weight, None, None, "split", torch.float32)
    grad = torch.randn(T, V)
    logits.backward(grad)

    assert not is_bf16
    assert torch.equal(logits, hidden.float() @ weight.T)
    assert torch.equal(hidden.grad, (grad @ weight.detach()).bfloat16())
    assert torch.equal(weight.grad, grad.T @ hidden.detach().float())


@pytest.mark.parametrize("wanted", ["hidden", "weight"])
def test_only_what_is_wanted_is_computed(wanted):
    hidden, weight, _ = made(torch.float32)
    leaf = {"hidden": hidden, "weight": weight}[wanted].requires_grad_()
    logits, _ = logits_operator(hidden, weight, None, None, "split", torch.float32)
    logits.sum().backward()

    assert leaf.grad.shape == leaf.shape
    assert all(tensor.grad is None for tensor in (hidden, weight) if tensor is not leaf)
