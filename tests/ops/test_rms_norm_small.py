"""Small norms on a CPU, which are asked for in as few steps as can be."""

import math

import pytest
import torch
from torch import nn

from automodel_fn import ConfigError, rms_norm_fp32
from automodel_fn.ops import _rms_norm
from automodel_fn.ops._choice import _WORTH_LESS_MEMORY as LARGE
from automodel_fn.ops._rms_norm_torch import composed, small_natively

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


class Subclass(torch.Tensor):
    pass


def arguments(dtype=torch.float32, **changed):
    given = {
        "x": torch.randn(3, 8, dtype=dtype),
        "weight": nn.Parameter(torch.randn(8, dtype=dtype)),
        "residual": None,
        "eps": 1e-5,
        "weight_multiply": "fp32",
    }
    return {**given, **changed}


@pytest.mark.parametrize("needs_grad", [True, False])
@pytest.mark.parametrize("shape", [(8,), (0, 8), (3, 8), (2, 5, 129), (511, 256)])
@pytest.mark.parametrize("dtype", BITS)
def test_they_have_the_bits_of_all_norms(dtype, shape, needs_grad):
    x = torch.randn(shape, dtype=dtype, requires_grad=needs_grad)
    weight = torch.randn(shape[-1], dtype=dtype)
    found = small_natively(x, weight, None, 1e-5, "fp32")

    assert found.requires_grad is needs_grad
    expected = composed(x, weight, 1e-5, "fp32")
    assert torch.equal(found.view(BITS[dtype]), expected.view(BITS[dtype]))


def test_the_norm_asks_for_them_first(monkeypatch):
    monkeypatch.setattr(_rms_norm, "_fits", None)
    x, weight = torch.randn(3, 8), torch.randn(8)

    assert torch.equal(rms_norm_fp32(x, weight, 1e-5), composed(x, weight, 1e-5, "fp32"))


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.ones(3, 8).as_subclass(Subclass)},
        {"x": torch.ones(3, 8).bfloat16()},
        {"x": torch.ones(3, 8, device="meta")},
        {"x": torch.ones(LARGE // 8, 8)},
        {"x": torch.ones(()), "weight": torch.ones(1)},
        {"x": torch.ones(3, 8).double(), "weight": torch.ones(8).double()},
        {"x": torch.ones(3, 8).int(), "weight": torch.ones(8).int()},
        {"weight": None},
        {"weight": 1.0},
        {"weight": torch.ones(8).as_subclass(Subclass)},
        {"weight": torch.ones(9)},
        {"weight": torch.ones(1)},
        {"weight": torch.ones(1, 8)},
        {"residual": torch.ones(3, 8)},
        {"residual": 1.0},
        {"eps": 1},
        {"eps": True},
        {"eps": -1e-5},
        {"eps": math.nan},
        {"eps": math.inf},
        {"weight_multiply": "input"},
        {"weight_multiply": ["fp32"]},
    ],
)
def test_what_is_not_simple_is_none(changed):
    assert small_natively(**arguments()) is not None
    assert small_natively(**arguments(**changed)) is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_in_a_transform_there_are_none():
    found, given = [], arguments()
    torch.func.vmap(lambda row: found.append(small_natively(**given)) or row)(torch.ones(2))

    assert found == [None]


@pytest.mark.parametrize("changed", [{"eps": -1.0}, {"weight": torch.ones(9)}, {"eps": True}])
def test_what_is_wrong_is_an_error_of_small_ones_too(changed):
    given = arguments(**changed)
    with pytest.raises(ConfigError, match="rms_norm_fp32 cannot be computed"):
        rms_norm_fp32(given["x"], given["weight"], given["eps"])
