import copy
import pickle

import pytest
import torch

from automodel_fn import ConfigError, Float32RMSNorm, rms_norm_fp32


def test_it_is_made_of_ones_as_the_original():
    norm = Float32RMSNorm(8)
    assert list(norm.state_dict()) == ["weight"]
    assert norm.weight.dtype == torch.bfloat16
    assert norm.weight.requires_grad
    assert torch.equal(norm.weight, torch.ones(8, dtype=torch.bfloat16))
    assert (norm.eps, norm.weight_multiply) == (1e-5, "fp32")


@pytest.mark.parametrize("weight_multiply", ["fp32", "input"])
@pytest.mark.parametrize("stored", ["float32", torch.bfloat16])
def test_its_forward_is_the_function(stored, weight_multiply):
    norm = Float32RMSNorm(33, 1e-6, dtype=stored, weight_multiply=weight_multiply)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(2, 5, 33).bfloat16()
    expected = rms_norm_fp32(x, norm.weight, 1e-6, weight_multiply=weight_multiply)
    assert torch.equal(norm(x), expected)


def test_its_parameters_are_reset_to_ones():
    norm = Float32RMSNorm(8)
    torch.nn.init.zeros_(norm.weight)
    weight = norm.weight
    norm.reset_parameters()
    assert norm.weight is weight
    assert torch.equal(weight, torch.ones(8, dtype=torch.bfloat16))


def test_it_is_made_on_meta_and_filled_later():
    norm = Float32RMSNorm(8, device="meta")
    assert norm.weight.is_meta
    assert norm(torch.empty(2, 8, device="meta")).shape == (2, 8)
    norm.to_empty(device="cpu").reset_parameters()
    assert torch.equal(norm.weight, torch.ones(8, dtype=torch.bfloat16))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))])
def test_it_can_be_copied_and_pickled(again):
    x = torch.randn(2, 8)
    norm = Float32RMSNorm(8, weight_multiply="input")
    assert torch.equal(again(norm)(x), norm(x))


def test_its_repr_says_its_options():
    norm = Float32RMSNorm(8, 1e-6, weight_multiply="input")
    expected = "Float32RMSNorm(8, eps=1e-06, weight_multiply='input', dtype=torch.bfloat16)"
    assert repr(norm) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dim": 0}, "dim=0"),
        ({"dim": True}, "dim=True"),
        ({"dim": (8,)}, "dim="),
        ({"dim": 8, "eps": -0.5}, r"eps=-0\.5"),
        ({"dim": 8, "dtype": "int8"}, r"dtype=torch\.int8"),
        ({"dim": 8, "dtype": "nonsense"}, "dtype='nonsense'"),
        ({"dim": 8, "weight_multiply": "late"}, "weight_multiply='late'"),
    ],
)
def test_what_no_norm_can_be_made_of_is_an_error(options, message):
    with pytest.raises(ConfigError, match=message):
        Float32RMSNorm(**options)


def test_its_second_option_is_given_by_name_only():
    with pytest.raises(TypeError):
        Float32RMSNorm(8, 1e-5, None, torch.float32, "input")
