from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from automodel_fn import Float32RMSNorm, fp32, lm_head_logits, rms_norm_fp32
from automodel_fn.ops._rms_norm import rms_norm_reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _bits(tensor):
    integer = {2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def _input(dtype, shape=(64, 1024)):
    generator = torch.Generator("cuda").manual_seed(torch.seed() % 2**31)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


@pytest.mark.parametrize("weight_multiply", ["fp32", "input"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_is_within_the_rounding_of_its_dtype(dtype, weight_multiply):
    x, weight = _input(dtype), torch.rand(1024, device="cuda") + 0.5

    found = rms_norm_fp32(x, weight, 1e-5, weight_multiply=weight_multiply)

    exact = rms_norm_reference(x, weight, 1e-5)
    roundings = 3 if weight_multiply == "input" else 2
    error = (found.double() - exact).abs() / exact.abs().clamp_min(1e-3)
    assert float(error.max()) <= roundings * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_has_the_same_bits_with_gradients_without_and_compiled(dtype):
    norm = Float32RMSNorm(1024, device="cuda", dtype=dtype)
    x = _input(dtype)
    compiled = torch.compile(norm, fullgraph=True)

    with torch.no_grad():
        plain, plain_compiled = norm(x), compiled(x)
    x.requires_grad_()

    for other in (norm(x), plain_compiled, compiled(x)):
        assert torch.equal(_bits(other), _bits(plain))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_equals_that_of_nemo_automodel_bit_for_bit(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils = pytest.importorskip("nemo_automodel.components.models.common.utils")
    ours = Float32RMSNorm(1024, device="cuda", dtype=dtype)
    theirs = utils.Float32RMSNorm(1024, device="cuda", dtype=dtype)
    with torch.no_grad():
        theirs.weight.copy_(ours.weight.uniform_(0.5, 1.5))
    x = _input(dtype)

    with torch.compiler.set_stance("force_eager"):
        expected = theirs(x)

    assert torch.equal(_bits(ours(x)), _bits(expected))


def test_the_gradients_of_the_norm_are_those_of_float64():
    x = _input(torch.bfloat16).requires_grad_()
    weight = (torch.rand(1024, device="cuda") + 0.5).requires_grad_()
    grad = _input(torch.bfloat16)

    rms_norm_fp32(x, weight, 1e-5).backward(grad)

    wide, wide_weight = x.detach().double().requires_grad_(), weight.detach().double()
    wide_weight.requires_grad_()
    rms_norm_reference(wide, wide_weight, 1e-5).backward(grad.double())
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=2**-7, atol=1e-3)
    torch.testing.assert_close(weight.grad.double(), wide_weight.grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_head_in_its_own_dtype_gives_its_own_logits(dtype):
    head = nn.Linear(256, 1000, device="cuda", dtype=dtype)
    hidden = _input(dtype, (2, 32, 256))

    found = lm_head_logits(head, hidden, output_hidden_states=True)

    assert torch.equal(_bits(found.logits), _bits(head(hidden)))
    assert found.hidden_states is hidden


def test_fp32_logits_of_a_bf16_head_are_those_of_its_values_in_fp32():
    head = nn.Linear(256, 1000, device="cuda", dtype=torch.bfloat16)
    hidden = _input(torch.bfloat16, (2, 32, 256))

    found = lm_head_logits(head, hidden, precision="fp32", logits_to_keep=4).logits

    exact = nn.functional.linear(hidden[:, -4:].double(), head.weight.double(), head.bias.double())
    assert found.dtype == fp32
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_an_fp32_head_reaches_its_bf16_weight():
    head = nn.Linear(256, 1000, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = _input(torch.bfloat16, (32, 256)).requires_grad_()

    lm_head_logits(head, hidden, precision="fp32", is_thd=True).logits.sum().backward()

    assert head.weight.grad.dtype == torch.bfloat16
    assert hidden.grad is not None
