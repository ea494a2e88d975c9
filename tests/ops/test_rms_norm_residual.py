import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from automodel_fn import ConfigError, Float32RMSNorm, rms_norm_fp32
from automodel_fn.testing import check_rms_norm_residual

both_ways = pytest.mark.parametrize("weight_multiply", ["fp32", "input"])


def made(shape, dtype):
    x, residual = torch.randn(2, *shape).to(dtype).unbind()
    return x, residual, torch.randn(shape[-1])


@both_ways
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 64), (2, 3, 17), (33,), (2, 0, 8), (0, 8)])
def test_a_residual_gives_the_bits_of_adding_first(shape, dtype, weight_multiply):
    x, residual, weight = made(shape, dtype)
    check_rms_norm_residual(x, residual, weight, 1e-5, weight_multiply=weight_multiply)


def test_the_norm_is_of_the_rounded_sum():
    x, residual = torch.full((1, 2), 256.0).bfloat16(), torch.tensor([[0.5, 1.5]]).bfloat16()

    normed, total = rms_norm_fp32(x, None, 0.0, residual=residual)

    assert total.tolist() == [[256.0, 258.0]]
    assert torch.equal(normed, rms_norm_fp32(total, None, 0.0))


@both_ways
def test_first_and_second_derivatives_are_right(weight_multiply):
    x, residual, weight = (tensor.requires_grad_() for tensor in made((2, 5), torch.float64))

    def norm(x, residual, weight):
        return rms_norm_fp32(
            x, weight.double(), 1e-3, weight_multiply=weight_multiply, residual=residual
        )

    leaves = (x, residual, weight.detach().double().requires_grad_())
    assert gradcheck(norm, leaves)
    assert gradgradcheck(norm, leaves)


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)])
def test_gradients_come_through_either_result(wanted):
    x, residual, weight = made((3, 8), torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (x, residual)]
    results = rms_norm_fp32(x, weight, 1e-5, residual=residual)
    total = x + residual
    expected = (rms_norm_fp32(total, weight, 1e-5), total)

    found = torch.autograd.grad(sum((results[i] ** 2).sum() for i in wanted), leaves)
    right = torch.autograd.grad(sum((expected[i] ** 2).sum() for i in wanted), leaves)

    torch.testing.assert_close(found, right)


@both_ways
def test_the_operator_fulfils_what_torch_asks_of_one(weight_multiply):
    x, residual, weight = made((3, 8), torch.float32)
    operator = torch.ops.automodel_fn.add_rms_norm_fp32.default
    arguments = (x.requires_grad_(), residual.half().requires_grad_(), weight.requires_grad_())
    torch.library.opcheck(operator, (*arguments, 1e-5, weight_multiply))


def test_compiled_it_is_one_operator_with_the_bits_of_eager_mode(graphs):
    norm = torch.compile(
        lambda x, weight, residual: rms_norm_fp32(x, weight, 1e-5, residual=residual),
        backend=graphs,
        fullgraph=True,
    )
    x, residual, weight = made((3, 33), torch.bfloat16)
    expected = rms_norm_fp32(x, weight, 1e-5, residual=residual)

    for found, right in zip(norm(x, weight, residual), expected, strict=True):
        assert torch.equal(found, right)
    (targets,) = graphs.targets
    assert any("add_rms_norm_fp32" in target for target in targets)
    assert not any(target.endswith("add>") for target in targets)


def test_compiled_gradients_are_those_of_eager_mode():
    torch._dynamo.reset()
    compiled = torch.compile(rms_norm_fp32, fullgraph=True, backend="aot_eager")
    grads = []
    x, residual, weight = made((3, 33), torch.float32)
    for norm in (rms_norm_fp32, compiled):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, residual, weight)]
        normed, total = norm(leaves[0], leaves[2], 1e-5, residual=leaves[1])
        (normed.sin() + total.cos()).sum().backward()
        grads.append([leaf.grad for leaf in leaves])

    torch.testing.assert_close(*grads)


def test_the_module_takes_one():
    norm = Float32RMSNorm(8)
    x, residual, _ = made((3, 8), torch.bfloat16)

    found = norm(x, residual)

    expected = rms_norm_fp32(x, norm.weight, norm.eps, residual=residual)
    for left, right in zip(found, expected, strict=True):
        assert torch.equal(left, right)


def test_meta_tensors_give_shapes_and_dtypes():
    x = torch.empty(2, 3, 8, device="meta", dtype=torch.float16)

    normed, total = rms_norm_fp32(x, None, 1e-5, residual=torch.empty(2, 3, 8, device="meta"))

    assert {(t.device.type, t.shape, t.dtype) for t in (normed, total)} == {
        ("meta", (2, 3, 8), torch.float16)
    }


@pytest.mark.parametrize(
    ("residual", "message"),
    [(torch.ones(3), r"shape \(3,\)"), (torch.ones(2, 3).int(), "residual has the dtype")],
)
def test_a_residual_that_does_not_fit_is_an_error(residual, message):
    with pytest.raises(ConfigError, match=message):
        rms_norm_fp32(torch.ones(2, 3), None, 1e-5, residual=residual)
