import copy

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from automodel_fn import lm_head_logits, rms_norm_fp32
from automodel_fn.testing import check_lm_head_logits, check_rms_norm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Inductor imports parts of torch that warn.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

SHAPES = ((64, 512), (7, 4096), (3, 1000), (2, 33, 129), (5, 16384))
both_ways = pytest.mark.parametrize("weight_multiply", ["fp32", "input"])
by_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


def made(shape, dtype):
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(shape, device="cuda", generator=generator) * 3
    return x.to(dtype), torch.randn(shape[-1:], device="cuda", generator=generator).to(dtype)


def leaves(*tensors):
    return [tensor.clone().requires_grad_() for tensor in tensors]


@by_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_the_norm_has_the_bits_of_the_original_and_of_llama(shape, dtype):
    x, weight = made(shape, dtype)
    original = functional.rms_norm(x.float(), shape[-1:], weight.float(), 1e-5).to(dtype)
    assert torch.equal(rms_norm_fp32(x, weight, 1e-5), original)
    llama = LlamaRMSNorm(shape[-1], eps=1e-5)
    llama.weight = nn.Parameter(weight)
    assert torch.equal(rms_norm_fp32(x, weight, 1e-5, weight_multiply="input"), llama(x))


@both_ways
@by_dtype
@pytest.mark.parametrize("shape", SHAPES)
def test_compiled_or_not_gradients_change_no_bit(shape, dtype, weight_multiply):
    torch._dynamo.reset()

    def norm(x, weight):
        return rms_norm_fp32(x, weight, 1e-5, weight_multiply=weight_multiply)

    compiled = torch.compile(norm, fullgraph=True)
    x, weight = made(shape, dtype)
    expected = norm(x, weight)
    with torch.no_grad():
        assert torch.equal(compiled(x, weight), expected)
    plain, traced = leaves(x, weight), leaves(x, weight)
    found = norm(*plain), compiled(*traced)
    assert torch.equal(found[0], expected)
    assert torch.equal(found[1], expected)
    for output in found:
        output.sum().backward()
    for left, right in zip(plain, traced, strict=True):
        scale = left.grad.float().abs().max()
        assert (left.grad.float() - right.grad.float()).abs().max() <= 0.02 * scale


@both_ways
@by_dtype
def test_the_law_of_the_norm_holds(dtype, weight_multiply):
    for shape in SHAPES:
        check_rms_norm(*made(shape, dtype), 1e-5, weight_multiply=weight_multiply)


@pytest.mark.parametrize("precision", [None, "fp32"])
@by_dtype
def test_the_law_of_the_logits_holds(dtype, precision):
    lm_head = nn.Linear(256, 1000, dtype=dtype, device="cuda")
    hidden = torch.randn(2, 33, 256, device="cuda")
    for keep in (0, 1, torch.tensor([3, 0], device="cuda")):
        check_lm_head_logits(copy.deepcopy(lm_head), hidden, keep, precision=precision)


def test_fp32_logits_are_not_undone_by_autocast():
    lm_head = nn.Linear(256, 1000, device="cuda")
    hidden = torch.randn(2, 33, 256, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = lm_head_logits(lm_head, hidden, precision="fp32").logits
    assert torch.equal(found, lm_head(hidden))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_positions_on_the_gpu_are_not_waited_for():
    lm_head = nn.Linear(16, 8, device="cuda")
    hidden, keep = torch.randn(1, 4, 16, device="cuda"), torch.tensor([1], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        lm_head_logits(lm_head, hidden, logits_to_keep=keep)
    finally:
        torch.cuda.set_sync_debug_mode("default")
