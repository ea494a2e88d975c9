import itertools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from automodel_fn import ConfigError, rms_norm_fp32
from automodel_fn.ops._rms_norm import rms_norm_reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
SHAPES = ((5, 64), (2, 3, 17), (1, 4096), (33,), (0, 8), (2, 0, 8))
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

both_ways = pytest.mark.parametrize("weight_multiply", ["fp32", "input"])


def bits(tensor):
    return tensor.detach().contiguous().view(INTEGERS[tensor.dtype.itemsize])


def same(left, right):
    return left.dtype == right.dtype and torch.equal(bits(left), bits(right))


def made(shape, dtype, weight_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(shape, generator=generator) * 3).to(dtype)
    weight = torch.randn(shape[-1:], generator=generator).to(weight_dtype or dtype)
    return x, weight


def original(x, weight, eps):
    return functional.rms_norm(x.float(), (x.shape[-1],), weight.float(), eps).to(x.dtype)


@pytest.mark.parametrize(("dtype", "stored"), list(itertools.product(DTYPES, DTYPES)))
@pytest.mark.parametrize("shape", SHAPES)
def test_fp32_has_the_bits_of_the_original(shape, dtype, stored):
    x, weight = made(shape, dtype, stored)
    assert same(rms_norm_fp32(x, weight, 1e-5), original(x, weight, 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_input_has_the_bits_of_llama(shape, dtype):
    x, weight = made(shape, dtype)
    norm = LlamaRMSNorm(shape[-1], eps=1e-6)
    norm.weight = torch.nn.Parameter(weight)
    assert same(rms_norm_fp32(x, weight, 1e-6, weight_multiply="input"), norm(x))


def test_the_two_ways_differ():
    x, weight = made((64, 512), torch.bfloat16)
    late = rms_norm_fp32(x, weight, 1e-5, weight_multiply="input")
    assert not same(rms_norm_fp32(x, weight, 1e-5), late)


@both_ways
@pytest.mark.parametrize(("dtype", "stored"), list(itertools.product(DTYPES, DTYPES)))
def test_gradients_change_no_bit_and_come_in_the_dtypes_of_the_inputs(
    dtype, stored, weight_multiply
):
    x, weight = made((3, 5, 129), dtype, stored)
    without = rms_norm_fp32(x, weight, 1e-5, weight_multiply=weight_multiply)
    leaves = [x.clone().requires_grad_(), weight.clone().requires_grad_()]
    found = rms_norm_fp32(*leaves, 1e-5, weight_multiply=weight_multiply)
    assert same(found, without)
    found.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [dtype, stored]


@both_ways
@pytest.mark.parametrize("with_weight", [True, False])
def test_first_and_second_derivatives_are_right(weight_multiply, with_weight):
    x, weight = made((2, 3, 5), torch.float64)
    leaves = [x.requires_grad_(), *([weight.requires_grad_()] if with_weight else [])]

    def norm(x, weight=None):
        return rms_norm_fp32(x, weight, 1e-3, weight_multiply=weight_multiply)

    assert gradcheck(norm, leaves)
    assert gradgradcheck(norm, leaves)


@both_ways
@pytest.mark.parametrize("with_weight", [True, False])
@pytest.mark.parametrize("shape", [(2, 3, 5), (4,)])
def test_the_derivatives_of_the_operator_that_is_compiled_are_right(
    shape, weight_multiply, with_weight
):
    x, weight = made(shape, torch.float64)
    leaves = [x.requires_grad_(), *([weight.requires_grad_()] if with_weight else [])]

    def norm(x, weight=None):
        return torch.ops.automodel_fn.rms_norm_fp32(x, weight, 1e-3, weight_multiply)

    assert gradcheck(norm, leaves)
    assert gradgradcheck(norm, leaves)


@both_ways
@pytest.mark.parametrize("weight", [None, torch.ones(8)])
def test_the_operator_fulfils_what_torch_asks_of_one(weight_multiply, weight):
    x = torch.randn(3, 8, requires_grad=True)
    operator = torch.ops.automodel_fn.rms_norm_fp32.default
    torch.library.opcheck(operator, (x, weight, 1e-5, weight_multiply))


def test_a_float64_input_is_computed_in_float64():
    x, weight = made((4, 33), torch.float64)
    expected = rms_norm_reference(x, weight, 1e-5)
    torch.testing.assert_close(rms_norm_fp32(x, weight, 1e-5), expected, rtol=1e-14, atol=0)


def test_without_a_weight_nothing_is_multiplied():
    x, _ = made((4, 33), torch.bfloat16)
    found = rms_norm_fp32(x, None, 1e-5)
    assert same(found, rms_norm_fp32(x, torch.ones(33), 1e-5))
    assert same(found, rms_norm_fp32(x, None, 1e-5, weight_multiply="input"))


@both_ways
def test_a_weight_of_more_precision_is_not_rounded_first(weight_multiply):
    weight = torch.full((4,), 1 + 2**-8)
    found = rms_norm_fp32(torch.ones(4).bfloat16() * 64, weight, 1e-9, weight_multiply="input")
    assert same(found, torch.full((4,), 1 + 2**-8).bfloat16())
    x, weight = made((9, 64), torch.bfloat16, torch.float32)
    found = rms_norm_fp32(x, weight, 1e-5, weight_multiply=weight_multiply)
    assert found.dtype == torch.bfloat16


@both_ways
def test_the_layout_of_the_input_does_not_matter(weight_multiply):
    x, weight = made((6, 4, 16), torch.bfloat16)
    plain = rms_norm_fp32(x, weight, 1e-5, weight_multiply=weight_multiply)
    turned = x.transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.stack([x, -x], -1).flatten(-2)[..., ::2]
    for other in (turned, sliced):
        assert not other.is_contiguous()
        assert same(rms_norm_fp32(other, weight, 1e-5, weight_multiply=weight_multiply), plain)


@both_ways
def test_a_row_of_zeros_stays_one(weight_multiply):
    x = torch.tensor([0.0, -0.0])
    found = rms_norm_fp32(x, torch.ones(2), 1e-5, weight_multiply=weight_multiply)
    assert bits(found).tolist() == [0, -(2**31)]


@both_ways
def test_meta_and_fake_tensors_give_shapes_and_dtypes(weight_multiply):
    def norm(x, weight):
        return rms_norm_fp32(x, weight, 1e-5, weight_multiply=weight_multiply)

    def norm_meta(**place):
        x = torch.empty(2, 3, 8, dtype=torch.bfloat16, **place)
        return norm(x, torch.empty(8, **place))

    found = norm_meta(device="meta")
    assert (found.device.type, found.shape, found.dtype) == ("meta", (2, 3, 8), torch.bfloat16)
    with FakeTensorMode():
        found = norm_meta()
    assert (found.shape, found.dtype) == ((2, 3, 8), torch.bfloat16)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@both_ways
def test_it_can_be_mapped_and_differentiated_by_torch_func(weight_multiply):
    x, weight = made((4, 8), torch.float32)

    def norm(row, weight):
        return rms_norm_fp32(row, weight, 1e-5, weight_multiply=weight_multiply)

    assert same(torch.func.vmap(norm, (0, None))(x, weight), norm(x, weight))
    value, slope = torch.func.jvp(lambda row: norm(row, weight), (x,), (torch.ones_like(x),))
    assert same(value, norm(x, weight))
    assert slope.shape == x.shape


@pytest.mark.parametrize("eps", [-1e-5, float("nan"), float("inf"), None, "1e-5", True])
def test_an_eps_that_is_no_positive_number_is_an_error(eps):
    with pytest.raises(ConfigError, match="eps="):
        rms_norm_fp32(torch.ones(2), None, eps)


@pytest.mark.parametrize(
    ("x", "weight", "message"),
    [
        (torch.ones(2, 3), torch.ones(2), r"shape \(2,\).*\(3,\)"),
        (torch.ones(2, 3), torch.ones(1, 3), r"shape \(1, 3\)"),
        (torch.ones(2, 3), torch.ones(()), r"shape \(\)"),
        (torch.ones(2, 3).int(), None, r"x has the dtype torch\.int32"),
        (torch.ones(2, 3), torch.ones(3).int(), r"weight has the dtype torch\.int32"),
        (torch.ones(()), None, "no dimension"),
    ],
)
def test_what_does_not_fit_is_an_error(x, weight, message):
    with pytest.raises(ConfigError, match=message):
        rms_norm_fp32(x, weight, 1e-5)


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError) as caught:
        rms_norm_fp32(torch.ones(2).int(), torch.ones(3), -1.0, weight_multiply="bf16")
    text = str(caught.value)
    assert all(part in text for part in ("eps=-1.0", "weight_multiply='bf16'", "int32", "(3,)"))


def test_with_eps_zero_a_row_of_zeros_is_nan_and_every_other_is_not():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0]])

    found = rms_norm_fp32(x, None, 0)

    assert found.isnan().tolist() == [[True, True], [False, False]]
