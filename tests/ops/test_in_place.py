"""What computes large tensors on a CPU: in place, from a number of elements that small ones reach
here."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from automodel_fn import rms_norm_fp32, swiglu
from automodel_fn.ops import _choice, _rms_norm_autograd, _swiglu
from automodel_fn.ops._rms_norm import rms_norm_reference
from automodel_fn.ops._swiglu import swiglu_reference
from automodel_fn.testing import check_rms_norm, check_rms_norm_residual, check_swiglu

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of the largest element: a gradient is off by its rounding, and by that of sums over rows.
TOLERANCE = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2e-6}

both_ways = pytest.mark.parametrize("weight_multiply", ["fp32", "input"])
by_dtype = pytest.mark.parametrize("dtype", DTYPES)
by_two_dtypes = pytest.mark.parametrize(
    ("dtype", "stored"), list(itertools.product(DTYPES, DTYPES))
)


@pytest.fixture
def large(monkeypatch):
    monkeypatch.setattr(_choice, "_WORTH_LESS_MEMORY", 0)


@pytest.fixture
def calls(monkeypatch):
    """The functions of gradients that were called."""
    seen = []
    for module, name in itertools.product(
        (_rms_norm_autograd, _swiglu), ("gradients", "gradients_in_place")
    ):
        made = getattr(module, name)
        monkeypatch.setattr(
            module, name, lambda *given, made=made: seen.append(made.__name__) or made(*given)
        )
    return seen


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def assert_near(found, exact):
    for left, right in zip(found, exact, strict=True):
        error = (left.double() - right).abs().max()
        assert error <= TOLERANCE[left.dtype] * right.abs().max(), error


def made_norm(dtype, stored, shape=(37, 129)):
    return (torch.randn(shape) * 3).to(dtype), torch.randn(shape[-1]).to(stored)


@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 17), (33,), (0, 8), (2, 0, 8)])
@both_ways
@by_two_dtypes
def test_a_norm_has_the_bits_of_a_small_one(monkeypatch, shape, dtype, stored, weight_multiply):
    x, weight = made_norm(dtype, stored, shape)
    for given in (weight, None):
        small = rms_norm_fp32(x, given, 1e-5, weight_multiply=weight_multiply)
        with monkeypatch.context() as patch:
            patch.setattr(_choice, "_WORTH_LESS_MEMORY", 0)
            found = rms_norm_fp32(x, given, 1e-5, weight_multiply=weight_multiply)
            check_rms_norm(x, given, 1e-5, weight_multiply=weight_multiply)
        assert found.dtype == small.dtype
        assert torch.equal(found, small)


@pytest.mark.usefixtures("large")
@both_ways
@by_dtype
def test_a_residual_gives_the_bits_of_adding_first(dtype, weight_multiply):
    x, weight = made_norm(dtype, torch.float32)
    check_rms_norm_residual(
        x, torch.randn(x.shape).to(dtype), weight, 1e-5, weight_multiply=weight_multiply
    )


@pytest.mark.usefixtures("large")
@both_ways
@by_two_dtypes
def test_gradients_of_a_norm_are_those_of_float64(calls, dtype, stored, weight_multiply):
    x, weight = made_norm(dtype, stored)
    dy = torch.randn(x.shape).to(dtype)
    kept = dy.clone()
    used, wide = leaves(x, weight), leaves(x.double(), weight.double())
    y = rms_norm_fp32(*used, 1e-5, weight_multiply=weight_multiply)
    found = torch.autograd.grad(y, used, dy, retain_graph=True)

    assert calls == ["gradients_in_place"]
    assert [grad.dtype for grad in found] == [dtype, stored]
    exact = torch.autograd.grad(rms_norm_reference(*wide, 1e-5), wide, kept.double())
    if weight_multiply == "fp32":
        assert_near(found, exact)
    else:
        # The gradient of this weight is of what was rounded.
        rounded = rms_norm_fp32(x, None, 1e-5).double()
        assert_near(found, (exact[0], (kept.double() * rounded).sum(0)))
    again = torch.autograd.grad(y, used, dy)
    assert all(torch.equal(left, right) for left, right in zip(found, again, strict=True))
    assert torch.equal(dy, kept)
    assert torch.equal(used[0], x)


@pytest.mark.usefixtures("large")
@by_dtype
def test_only_the_gradients_that_are_wanted_are_made(dtype):
    x, weight = made_norm(dtype, dtype)
    dy = torch.randn(x.shape).to(dtype)
    both = leaves(x, weight)
    of_x, of_weight = torch.autograd.grad(rms_norm_fp32(*both, 1e-5), both, dy)

    (alone,) = torch.autograd.grad(rms_norm_fp32(both[0], weight, 1e-5), both[:1], dy)
    assert torch.equal(alone, of_x)
    (alone,) = torch.autograd.grad(rms_norm_fp32(x, both[1], 1e-5), both[1:], dy)
    assert torch.equal(alone, of_weight)


@pytest.mark.usefixtures("large")
@both_ways
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5), (4,)])
def test_first_and_second_derivatives_of_a_norm_are_right(
    calls, shape, weight_multiply, with_weight
):
    x, weight = made_norm(torch.float64, torch.float64, shape)
    used = leaves(x, weight) if with_weight else leaves(x)

    def norm(x, weight=None):
        return rms_norm_fp32(x, weight, 1e-3, weight_multiply=weight_multiply)

    assert gradcheck(norm, used)
    assert gradgradcheck(norm, used)
    assert set(calls) == {"gradients", "gradients_in_place"}


@by_dtype
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 17), (33,), (2, 0, 8), (0,), ()])
def test_swiglu_has_the_bits_of_a_small_one(monkeypatch, shape, dtype):
    gate, up = (torch.randn(2, *shape) * 4).to(dtype).unbind()
    small = swiglu(*leaves(gate, up)).detach()
    monkeypatch.setattr(_choice, "_WORTH_LESS_MEMORY", 0)

    assert torch.equal(swiglu(*leaves(gate, up)).detach(), small)
    check_swiglu(gate, up)


@pytest.mark.usefixtures("large")
@by_dtype
def test_gradients_of_swiglu_are_those_of_float64(calls, dtype):
    gate, up = (torch.randn(2, 37, 129) * 4).to(dtype).unbind()
    dy = torch.randn(gate.shape).to(dtype)
    kept = dy.clone()
    used, wide = leaves(gate, up), leaves(gate.double(), up.double())
    y = swiglu(*used)
    found = torch.autograd.grad(y, used, dy, retain_graph=True)

    assert calls == ["gradients_in_place"]
    assert_near(found, torch.autograd.grad(swiglu_reference(*wide), wide, kept.double()))
    again = torch.autograd.grad(y, used, dy)
    assert all(torch.equal(left, right) for left, right in zip(found, again, strict=True))
    assert torch.equal(dy, kept)
    assert torch.equal(used[0], gate)
    assert torch.equal(used[1], up)


@pytest.mark.usefixtures("large")
def test_first_and_second_derivatives_of_swiglu_are_right(calls):
    used = leaves(*torch.randn(2, 2, 3, dtype=torch.float64).unbind())

    assert gradcheck(swiglu, used)
    assert gradgradcheck(swiglu, used)
    assert set(calls) == {"gradients", "gradients_in_place"}


@pytest.mark.usefixtures("large")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_what_torch_func_maps_is_not_computed_in_place():
    x, others = torch.randn(3, 8, requires_grad=True), torch.randn(2, 8)
    mapped = torch.func.vmap(lambda weight: rms_norm_fp32(x, weight, 1e-5))(others)
    assert torch.equal(mapped, torch.stack([rms_norm_fp32(x, one, 1e-5) for one in others]))

    mapped = torch.func.vmap(lambda up: swiglu(x, up.expand(3, 8)))(others)
    assert torch.equal(mapped, torch.stack([swiglu(x, one.expand(3, 8)) for one in others]))


def test_what_is_small_has_no_function_of_python_in_its_graph_and_what_is_large_has_one():
    shapes = {(64, 128): False, (1024, 128): True}
    for shape, is_large in shapes.items():
        x = torch.randn(shape, requires_grad=True)
        for y in (rms_norm_fp32(x, torch.ones(128), 1e-5), swiglu(x, torch.ones(shape))):
            assert ("_ByTorch" in type(y.grad_fn).__name__) == is_large


def test_where_large_begins_no_bit_changes():
    x, up = torch.randn(2, 1024, 128).bfloat16().unbind()
    weight = torch.randn(128)
    rows = [
        (rms_norm_fp32(part, weight, 1e-5), swiglu(part, other))
        for part, other in zip(x.split(512), up.split(512), strict=True)
    ]
    normed, gated = (torch.cat(parts) for parts in zip(*rows, strict=True))

    assert torch.equal(rms_norm_fp32(x, weight, 1e-5), normed)
    assert torch.equal(swiglu(x, up), gated)
