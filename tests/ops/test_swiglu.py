import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional

from automodel_fn import ConfigError, swiglu
from automodel_fn.ops import _swiglu_torch
from automodel_fn.ops._swiglu import swiglu_reference
from automodel_fn.ops._swiglu_packed import swiglu_packed
from automodel_fn.testing import check_swiglu

by_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


def made(shape, dtype):
    return (torch.randn(2, *shape) * 4).to(dtype).unbind()


@by_dtype
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 17), (33,), (2, 0, 8), (0,), ()])
def test_it_is_off_by_its_roundings_only(shape, dtype):
    check_swiglu(*made(shape, dtype))


@by_dtype
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 18), (0, 8)])
def test_a_packed_projection_is_its_halves(shape, dtype):
    packed = (torch.randn(shape) * 4).to(dtype).requires_grad_()
    y, halves = swiglu_packed(packed), swiglu(*packed.chunk(2, -1))
    dy = torch.randn_like(y)

    assert torch.equal(y, halves)
    assert torch.equal(
        torch.autograd.grad(y, packed, dy)[0], torch.autograd.grad(halves, packed, dy)[0]
    )


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3, 17)])
def test_a_packed_projection_without_halves_is_an_error_that_shows_its_shape(shape):
    with pytest.raises(ConfigError, match=re.escape(f"the shape {shape}; its last dimension")):
        swiglu_packed(torch.ones(shape))


@by_dtype
def test_it_is_rounded_once(dtype):
    gate, up = made((9, 65), dtype)

    assert torch.equal(swiglu(gate, up), (functional.silu(gate.float()) * up.float()).to(dtype))


def test_a_float64_input_is_computed_in_float64():
    gate, up = made((9, 65), torch.float64)

    torch.testing.assert_close(swiglu(gate, up), swiglu_reference(gate, up), rtol=1e-14, atol=0)


def test_first_and_second_derivatives_are_right():
    leaves = [tensor.clone().requires_grad_() for tensor in made((2, 3), torch.float64)]

    assert gradcheck(swiglu, leaves)
    assert gradgradcheck(swiglu, leaves)


def test_the_operator_fulfils_what_torch_asks_of_one():
    gate, up = (tensor.clone().requires_grad_() for tensor in made((3, 8), torch.float32))

    torch.library.opcheck(torch.ops.automodel_fn.swiglu.default, (gate, up))


@by_dtype
def test_gradients_come_in_the_dtype_of_the_inputs(dtype):
    leaves = [tensor.clone().requires_grad_() for tensor in made((3, 8), dtype)]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]

    swiglu(*leaves).sum().backward()
    swiglu_reference(*wide).sum().backward()

    for leaf, other in zip(leaves, wide, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad.to(dtype))


def test_halves_of_one_tensor_are_taken_where_they_lie():
    packed = torch.randn(3, 16).bfloat16()
    gate, up = packed.chunk(2, -1)

    assert torch.equal(swiglu(gate, up), swiglu(gate.contiguous(), up.contiguous()))
    assert torch.equal(swiglu(gate.T, up.T), swiglu(gate, up).T)


def test_compiled_it_is_one_operator_with_the_bits_of_eager_mode(graphs):
    gate, up = made((3, 33), torch.bfloat16)
    compiled = torch.compile(swiglu, backend=graphs, fullgraph=True)

    assert torch.equal(compiled(gate, up), swiglu(gate, up))
    (targets,) = graphs.targets
    assert any("automodel_fn.swiglu" in target for target in targets)


def test_compiled_gradients_are_those_of_eager_mode():
    torch._dynamo.reset()
    gate, up = made((3, 33), torch.float32)
    grads = []
    for used in (swiglu, torch.compile(swiglu, backend="aot_eager", fullgraph=True)):
        leaves = [tensor.clone().requires_grad_() for tensor in (gate, up)]
        used(*leaves).sin().sum().backward()
        grads.append([leaf.grad for leaf in leaves])

    torch.testing.assert_close(*grads)


def test_an_exported_program_needs_no_operator_of_this_package():
    class Gate(torch.nn.Module):
        def forward(self, gate, up):
            return swiglu(gate, up)

    gate, up = made((2, 4), torch.float32)
    program = torch.export.export(Gate(), (gate, up))

    assert not any("automodel_fn" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(program.module()(gate, up), swiglu(gate, up))


def test_meta_and_fake_tensors_give_shapes_and_dtypes():
    found = swiglu(*(torch.empty(2, 8, device="meta", dtype=torch.float16) for _ in range(2)))
    assert (found.device.type, found.shape, found.dtype) == ("meta", (2, 8), torch.float16)
    with FakeTensorMode():
        found = swiglu(torch.empty(2, 8), torch.empty(2, 8))
    assert found.shape == (2, 8)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_it_can_be_mapped_by_torch_func():
    gate, up = made((4, 8), torch.float32)

    assert torch.equal(torch.func.vmap(swiglu)(gate, up), swiglu(gate, up))


def test_all_that_does_not_fit_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        swiglu(torch.ones(2).int(), torch.ones(3))
    text = str(caught.value)

    assert all(part in text for part in ("(2,)", "(3,)", "int32", "floating point"))


def test_two_dtypes_are_an_error():
    with pytest.raises(ConfigError, match=r"torch\.float32.*torch\.bfloat16"):
        swiglu(torch.ones(2), torch.ones(2).bfloat16())


def test_strided_the_law_compares_what_lies_alike_in_memory():
    # Of float64, PyTorch's vectors and its single values differ in the last bit.
    gate, up = torch.randn(2, 512, 8, dtype=torch.float64)[..., ::2]
    check_swiglu(gate, up)


LARGE = (7, 96, 1000)


@pytest.fixture
def few_at_a_time(monkeypatch):
    monkeypatch.setattr(_swiglu_torch, "_LARGE", 0)
    monkeypatch.setattr(_swiglu_torch, "_PIECE", 4096)


@by_dtype
@pytest.mark.parametrize("is_packed", [False, True])
def test_in_pieces_it_has_the_bits_of_the_whole(few_at_a_time, dtype, is_packed):
    gate, up = made(LARGE, dtype)
    if is_packed:
        gate, up = torch.cat([gate, up], -1).chunk(2, -1)
    found = swiglu(gate, up)

    assert found.is_contiguous()
    assert torch.equal(found, _swiglu_torch.composed(gate, up))


@by_dtype
@pytest.mark.parametrize("lies", ["contiguous", "packed", "transposed", "expanded"])
def test_gradients_in_pieces_are_those_of_the_whole(few_at_a_time, dtype, lies):
    gate, up, dy = (torch.randn(3, *LARGE) * 4).to(dtype).unbind()
    if lies == "packed":
        gate, up = torch.cat([gate, up], -1).chunk(2, -1)
    if lies == "transposed":
        gate, up, dy = (x.transpose(0, 2) for x in (gate, up, dy))
    if lies == "expanded":
        dy = torch.ones((), dtype=dtype).expand(LARGE)
    leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    found = torch.autograd.grad(swiglu(*leaves), leaves, dy)
    exact = torch.autograd.grad(swiglu_reference(*wide), wide, dy.double())

    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(
            ours,
            theirs.to(dtype),
            rtol=2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps,
            atol=1e-4,
        )
