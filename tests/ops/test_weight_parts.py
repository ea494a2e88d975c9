import pytest
import torch
from torch import nn

from automodel_fn import ConfigError, WeightParts, weight_parts
from automodel_fn.ops import _weight_parts
from automodel_fn.ops._split import split_, split_kernel
from automodel_fn.ops._weight_parts import rounded_weight

NUM_PARTS = {torch.float32: 3, torch.float16: 2, torch.bfloat16: 1}
V, H = 11, 16


def weight(dtype=torch.float32, scale=0.02):
    torch.manual_seed(0)
    return (torch.randn(V, H) * scale).to(dtype)


def total(parts):
    return sum(parts.part(index).double() for index in range(parts.num_parts))


def with_number(number, dtype=torch.float32):
    changed = weight(dtype)
    changed[3, 5] = number
    return changed


@pytest.mark.parametrize("scale", [1e-20, 0.02, 1e20])
@pytest.mark.parametrize("dtype", NUM_PARTS)
def test_parts_add_up_to_the_weight(dtype, scale):
    whole = weight(dtype, scale if dtype != torch.float16 else 0.02)
    parts = weight_parts(whole)

    assert parts.is_exact
    assert parts.num_parts == NUM_PARTS[dtype]
    assert parts.stacked.dtype == torch.bfloat16
    assert torch.equal(total(parts), whole.double())


def test_the_first_part_is_the_rounded_weight_and_each_next_one_what_is_left():
    whole = weight()
    parts = weight_parts(whole)
    rest = whole.double()
    for index in range(3):
        expected = rest.bfloat16()
        assert torch.equal(parts.part(index), expected)
        rest = rest - expected.double()

    assert torch.equal(parts.high, parts.part(0))
    assert torch.equal(parts.stacked, torch.cat([parts.part(i) for i in (2, 1, 0)], 1))


def test_a_bf16_weight_is_its_own_part_without_a_copy():
    whole = weight(torch.bfloat16)

    assert weight_parts(whole).stacked.data_ptr() == whole.data_ptr()


@pytest.mark.parametrize("number", [0.0, -0.0, 2.0**-108, 1.9999999 * 2.0**-108, -3.38e38])
def test_a_number_in_range_is_held_exactly(number):
    whole = with_number(number)
    parts = weight_parts(whole)

    assert parts.is_exact
    assert torch.equal(total(parts), whole.double())
    assert torch.signbit(parts.high[3, 5]) == torch.signbit(whole[3, 5])


@pytest.mark.parametrize(
    "number",
    [1e-45, 1e-40, -1.9999999 * 2.0**-120, 3.4e38, float("inf"), float("-inf"), float("nan")],
)
def test_a_number_out_of_range_is_said(number):
    assert not weight_parts(with_number(number)).is_exact


def test_a_tiny_number_with_few_bits_is_in_range():
    assert weight_parts(with_number(2.0**-130)).is_exact


@pytest.mark.parametrize("number", [float("inf"), float("nan"), 1e-7])
def test_of_fp16_only_what_is_not_finite_is_out_of_range(number):
    parts = weight_parts(with_number(number, torch.float16))

    assert parts.is_exact == torch.tensor(number).isfinite()


def test_one_number_out_of_range_in_any_chunk_counts(monkeypatch):
    whole = with_number(1e-40)
    monkeypatch.setattr(_weight_parts, "_NUMBERS_AT_ONCE", 3 * H)

    assert not weight_parts(whole).is_exact
    assert weight_parts(whole[:3]).is_exact
    assert torch.equal(weight_parts(weight()).stacked, weight_parts(weight().clone()).stacked)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_weight_has_empty_parts(shape):
    parts = weight_parts(torch.empty(shape))

    assert parts.is_exact
    assert parts.high.shape == shape


def test_a_weight_of_other_strides_has_the_same_parts():
    whole = weight()
    strided = whole.t().contiguous().t()

    assert torch.equal(weight_parts(strided).stacked, weight_parts(whole).stacked)


def test_parts_are_cut_off_from_autograd_and_from_the_weight():
    whole = nn.Parameter(weight())
    parts = weight_parts(whole)
    before = parts.stacked.clone()
    with torch.no_grad():
        whole.add_(1)

    assert not parts.stacked.requires_grad
    assert torch.equal(parts.stacked, before)


@pytest.mark.parametrize(
    "wrong", [torch.ones(3), torch.ones(3, 4, dtype=torch.float64), torch.ones(2, 2).int()]
)
def test_what_has_no_parts_is_an_error(wrong):
    with pytest.raises(ConfigError, match=r"must be \[V, H\], fp32, fp16 or bf16"):
        weight_parts(wrong)


def test_parts_are_frozen():
    with pytest.raises(AttributeError):
        weight_parts(weight()).num_parts = 2


@pytest.mark.parametrize("dtype", NUM_PARTS)
def test_a_rounded_weight_is_one_part(dtype):
    found = rounded_weight(nn.Parameter(weight(dtype)))

    assert isinstance(found, WeightParts)
    assert torch.equal(found.high, weight(dtype).bfloat16())
    assert found.num_parts == 1


def test_torch_splits_on_the_cpu():
    assert (split_kernel(weight()).name, split_kernel(weight()).reason) == ("torch", "x is on cpu")


def test_fewer_parts_than_a_dtype_has_are_not_exact():
    parts = torch.empty(2, V, H, dtype=torch.bfloat16)

    assert not split_(weight(), parts)
    assert (parts.double().sum(0) - weight().double()).abs().max() < 2**-17 * weight().abs().max()
