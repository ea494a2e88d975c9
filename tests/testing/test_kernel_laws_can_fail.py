import pytest
import torch

from automodel_fn import rms_norm_fp32, swiglu
from automodel_fn.testing import check_rms_norm_residual, check_rms_norm_scale, check_swiglu


@pytest.fixture
def x():
    return torch.tensor([[3.0, -4.0, 1.0078125], [1e-3, 2.0, 0.0]]).bfloat16()


def normalizes_the_sum_before_it_is_rounded(x, weight, eps, *, residual=None, **options):
    if residual is None:
        return rms_norm_fp32(x, weight, eps, **options)
    y = rms_norm_fp32(x.float() + residual.float(), weight, eps, **options).to(x.dtype)
    return y, x + residual


def forgets_the_residual(x, weight, eps, *, residual=None, **options):
    y = rms_norm_fp32(x, weight, eps, **options)
    return y if residual is None else (y, x + residual)


def gives_the_residual_back(x, weight, eps, *, residual=None, **options):
    if residual is None:
        return rms_norm_fp32(x, weight, eps, **options)
    return rms_norm_fp32(x + residual, weight, eps, **options), residual


def differs_with_gradients(x, weight, eps, *, residual=None, **options):
    if residual is None:
        return rms_norm_fp32(x, weight, eps, **options)
    found = rms_norm_fp32(x, weight, eps, residual=residual, **options)
    return (found[0] + 1, found[1]) if x.requires_grad else found


@pytest.mark.parametrize(
    "wrong",
    [
        normalizes_the_sum_before_it_is_rounded,
        forgets_the_residual,
        gives_the_residual_back,
        differs_with_gradients,
    ],
)
def test_a_norm_that_is_wrong_with_a_residual_is_told(stand_in, wrong):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 9, 64).bfloat16().unbind()
    check_rms_norm_residual(x, residual, None, 1e-5)
    stand_in("kernels", "rms_norm_fp32", wrong)
    with pytest.raises(AssertionError, match="with a residual"):
        check_rms_norm_residual(x, residual, None, 1e-5)


def forgets_eps(x, weight, eps):
    return rms_norm_fp32(x, weight, 1e-2)


def computes_in_float16(x, weight, eps):
    return rms_norm_fp32(x.half(), weight, eps).to(x.dtype)


@pytest.mark.parametrize("wrong", [forgets_eps, computes_in_float16])
def test_a_norm_that_depends_on_the_scale_is_told(stand_in, x, wrong):
    check_rms_norm_scale(x, 1e-5, 15)
    stand_in("kernels", "rms_norm_fp32", wrong)
    with pytest.raises(AssertionError, match="scale"):
        check_rms_norm_scale(x, 1e-5, 15)


def rounds_the_gate_first(gate, up):
    return torch.nn.functional.silu(gate) * up


def forgets_what_is_multiplied(gate, up):
    return swiglu(gate, torch.ones_like(up))


def gates_the_other(gate, up):
    return swiglu(up, gate)


def adds_with_gradients(gate, up):
    found = swiglu(gate, up)
    return found + 1 if gate.requires_grad else found


def gives_another_dtype(gate, up):
    return swiglu(gate, up).float()


def changes_its_input(gate, up):
    found = swiglu(gate, up)
    if not gate.requires_grad:
        gate[0] += 1
    return found


@pytest.mark.parametrize(
    "wrong",
    [
        rounds_the_gate_first,
        forgets_what_is_multiplied,
        gates_the_other,
        adds_with_gradients,
        gives_another_dtype,
        changes_its_input,
    ],
)
def test_a_swiglu_that_is_wrong_is_told(stand_in, wrong):
    torch.manual_seed(0)
    gate, up = torch.randn(2, 9, 64).bfloat16().unbind()
    check_swiglu(gate, up)
    stand_in("kernels", "swiglu", wrong)
    with pytest.raises(AssertionError, match="swiglu"):
        check_swiglu(gate, up)
