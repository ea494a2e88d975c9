import pytest
import torch

from automodel_fn import swiglu, swiglu_kernel
from automodel_fn.ops._swiglu import swiglu_reference
from automodel_fn.ops._swiglu_packed import swiglu_packed
from automodel_fn.testing import check_swiglu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Inductor imports parts of torch that warn.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

SHAPES = ((64, 512), (3, 1999), (2, 33, 129), (70000, 3), (0, 8), (1,))
# Of the largest element: a gradient is off by its rounding.
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 1e-6}

by_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE))
by_shape = pytest.mark.parametrize("shape", SHAPES)


def made(shape, dtype):
    return (torch.randn(2, *shape, device="cuda") * 4).to(dtype).unbind()


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@by_dtype
@by_shape
def test_the_law_of_swiglu_holds(shape, dtype):
    gate, up = made(shape, dtype)
    assert swiglu_kernel(gate, up).name == "triton"
    check_swiglu(gate, up)


@by_dtype
@by_shape
def test_gradients_are_those_of_float64(shape, dtype):
    tensors = leaves(*made(shape, dtype))
    wide = leaves(*(tensor.detach().double() for tensor in tensors))
    dy = torch.randn(shape, device="cuda").to(dtype)
    y = swiglu(*tensors)

    found = torch.autograd.grad(y, tensors, dy, retain_graph=True)
    again = torch.autograd.grad(y, tensors, dy)
    exact = torch.autograd.grad(swiglu_reference(*wide), wide, dy.double())

    for left, right, other in zip(found, exact, again, strict=True):
        assert torch.equal(left, other)
        error = (left.double() - right).abs()
        assert (error <= TOLERANCE[dtype] * (right.abs().max() if right.numel() else 0)).all()


@by_dtype
@pytest.mark.parametrize("shape", [(64, 512), (2, 33, 130), (0, 8), (70000, 6), (12,)])
def test_the_gradient_of_a_packed_projection_has_the_bits_of_its_halves(shape, dtype):
    packed = (torch.randn(shape, device="cuda") * 4).to(dtype).requires_grad_()
    y, halves = swiglu_packed(packed), swiglu(*packed.chunk(2, -1))
    dy = torch.randn_like(y)
    (found,), (expected,) = (torch.autograd.grad(each, packed, dy) for each in (y, halves))

    assert torch.equal(y, halves)
    assert torch.equal(found, expected)
    assert found.is_contiguous()


@by_dtype
def test_halves_of_one_tensor_are_read_where_they_lie(dtype):
    packed = torch.randn(65, 2, 2 * 333, device="cuda").to(dtype)
    gate, up = packed.chunk(2, -1)
    plain = leaves(gate, up)
    strided = [tensor.detach().requires_grad_() for tensor in (gate, up)]
    expected, found = swiglu(*plain), swiglu(*strided)

    assert torch.equal(found, expected)
    assert found.is_contiguous()
    pairs = (torch.autograd.grad(y.sum(), of) for y, of in ((expected, plain), (found, strided)))
    for left, right in zip(*pairs, strict=True):
        assert torch.equal(left, right)


@by_dtype
def test_compiled_the_bits_are_those_of_eager_mode_gradients_too(dtype):
    torch._dynamo.reset()
    gate, up = made((33, 129), dtype)
    compiled = torch.compile(swiglu, fullgraph=True)
    dy = torch.randn(33, 129, device="cuda").to(dtype)
    plain, traced = leaves(gate, up), leaves(gate, up)
    expected, found = swiglu(*plain), compiled(*traced)

    assert torch.equal(found, expected)
    pairs = (torch.autograd.grad(y, of, dy) for y, of in ((expected, plain), (found, traced)))
    for left, right in zip(*pairs, strict=True):
        assert torch.equal(left, right)


def test_fifty_shapes_need_two_graphs_at_most():
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(swiglu, fullgraph=True)
    for rows in range(2, 52):
        compiled(*made((rows, 64), torch.bfloat16))
    assert counters["stats"]["unique_graphs"] <= 2


def test_a_second_derivative_is_refused():
    tensors = leaves(*made((4, 8), torch.float32))
    (first,) = torch.autograd.grad(swiglu(*tensors).sin().sum(), tensors[0], create_graph=True)

    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
