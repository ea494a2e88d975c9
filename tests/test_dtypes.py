import pytest
import torch

from automodel_fn import ConfigError, bf16, fp16, fp32
from automodel_fn.dtypes import CASTABLE, dtype_name, is_wider, parse_castable, parse_dtype

ALL = sorted({d for d in vars(torch).values() if isinstance(d, torch.dtype)}, key=str)


def test_the_short_names_are_torchs_dtypes():
    assert (bf16, fp16, fp32) == (torch.bfloat16, torch.float16, torch.float32)
    assert {bf16, fp16, fp32} == CASTABLE


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_name_and_parse_are_inverse(dtype):
    assert "." not in dtype_name(dtype)
    assert parse_dtype(dtype_name(dtype)) is dtype
    assert parse_dtype(str(dtype)) is dtype
    assert parse_dtype(dtype) is dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("fp32", torch.float32),
        ("half", torch.float16),
        ("float", torch.float32),
        ("double", torch.float64),
        ("torch.bfloat16", torch.bfloat16),
        ("int8", torch.int8),
    ],
)
def test_a_name_stands_for_its_dtype(name, dtype):
    assert parse_dtype(name) is dtype


@pytest.mark.parametrize(
    "value",
    ["", "fp8", "BF16", " bf16", "Tensor", "nn", "dtype", "torch.", "__name__", 16, None, float],
    ids=repr,
)
def test_what_is_no_dtype_is_an_error_that_shows_it(value):
    with pytest.raises(ConfigError, match="is not a dtype") as caught:
        parse_dtype(value)
    assert f"dtype={value!r}" in str(caught.value)


@pytest.mark.parametrize("value", ["bf16", "float16", torch.float32])
def test_a_castable_dtype_is_parsed(value):
    assert parse_castable(value) is parse_dtype(value)


@pytest.mark.parametrize("dtype", [d for d in ALL if d not in (bf16, fp16, fp32)], ids=str)
def test_no_other_dtype_is_castable(dtype):
    with pytest.raises(
        ConfigError, match=f"compute_dtype={dtype_name(dtype)} .*bf16, fp16 or fp32"
    ):
        parse_castable(dtype, "compute_dtype")


@pytest.mark.parametrize("dtype", ALL, ids=str)
def test_no_dtype_is_wider_than_itself(dtype):
    assert not is_wider(dtype, dtype)


@pytest.mark.parametrize(
    ("dtype", "other", "expected"),
    [
        (fp32, bf16, True),
        (fp32, fp16, True),
        (torch.float64, fp32, True),
        (bf16, fp16, False),
        (fp16, bf16, False),
        (bf16, fp32, False),
    ],
)
def test_wider_means_more_bytes(dtype, other, expected):
    assert is_wider(dtype, other) is expected
