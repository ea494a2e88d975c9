import copy

import pytest
import torch
from torch import nn

from automodel_fn import ConfigError, LMHead, lm_head_logits, logits_path, weight_parts
from automodel_fn.ops._products import hidden_gradient, logits_by_parts, weight_gradient
from automodel_fn.ops._split import _split_by_torch, split_, split_kernel
from automodel_fn.testing import check_lm_head_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Inductor imports parts of torch that warn.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((37, 64, 211), (1, 128, 1000), (130, 72, 77), (256, 4096, 2048))
# Of a result that is rounded to a dtype; sums of bf16 products lose more than float32's rounding.
ROUNDING = {torch.float32: 5e-6, torch.float16: 3e-4, torch.bfloat16: 2.5e-3}
stored_as = pytest.mark.parametrize("stored", DTYPES)


def made(shape, stored=torch.float32):
    t, h, v = shape
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(t, h, device="cuda", generator=generator).bfloat16()
    weight = (torch.randn(v, h, device="cuda", generator=generator) * 0.02).to(stored)
    return hidden, weight, torch.randn(t, v, device="cuda", generator=generator)


def head(weight):
    lm_head = nn.Linear(*weight.t().shape, bias=False, device="meta")
    lm_head.weight = nn.Parameter(weight.clone())
    return lm_head


def error(found, exact):
    return ((found.double() - exact).norm() / exact.norm()).item()


def test_the_kernel_splits_every_bit_pattern_as_torch_does():
    bits = torch.randint(-(2**31), 2**31 - 1, (513, 1031), device="cuda", dtype=torch.int32)
    numbers = torch.cat([bits.view(torch.float32), torch.randn(100, 1031, device="cuda")])
    for x in (numbers, numbers.t(), numbers[:, 3::2], numbers.half(), numbers[:0]):
        for num_parts in (1, 2, 3):
            found = torch.empty(num_parts, *x.shape, device="cuda", dtype=torch.bfloat16)
            expected = torch.empty_like(found)
            assert split_kernel(x).name == "triton"
            assert torch.equal(split_(x, found), _split_by_torch(x, expected))
            same = found.view(torch.int16) == expected.view(torch.int16)
            assert (same | (found.isnan() & expected.isnan())).all()


@pytest.mark.parametrize(
    "number", [2.0**-108, 3.38e38, 1e-40, 3.4e38, float("inf"), float("nan"), -0.0]
)
def test_whether_parts_are_exact_is_what_the_cpu_says(number):
    weight = torch.randn(64, 300)
    weight[40, 299] = number
    assert weight_parts(weight.cuda()).is_exact == weight_parts(weight).is_exact


@pytest.mark.parametrize("is_given", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@stored_as
def test_logits_and_gradients_are_off_by_their_roundings_only(stored, shape, is_given):
    hidden, weight, grad = made(shape, stored)
    lm_head, x = head(weight), hidden.clone().requires_grad_()
    parts = weight_parts(lm_head.weight) if is_given else None
    logits = lm_head_logits(lm_head, x, precision="bf16x3", weight_parts=parts).logits
    logits.backward(grad)

    assert logits_path(x, lm_head.weight, precision="bf16x3").name == "bf16"
    assert error(logits.detach(), hidden.double() @ weight.double().T) < ROUNDING[torch.float32]
    assert error(x.grad, grad.double() @ weight.double()) < ROUNDING[torch.bfloat16]
    assert error(lm_head.weight.grad, grad.double().T @ hidden.double()) < ROUNDING[stored]


@pytest.mark.parametrize("precision", ["bf16x3", "bf16"])
@stored_as
def test_the_law_of_logits_holds(stored, precision):
    hidden, weight, _ = made((10, 256, 500), stored)
    check_lm_head_logits(head(weight), hidden.view(2, 5, -1), 3, precision=precision)


def test_no_setting_of_torch_changes_a_bit(monkeypatch):
    hidden, weight, grad = made((256, 4096, 2048))
    parts = weight_parts(weight)

    def results():
        return (
            logits_by_parts(hidden, parts),
            hidden_gradient(grad, parts),
            weight_gradient(grad, hidden, torch.float32),
        )

    expected, matmul = results(), torch.backends.cuda.matmul
    for allowed in (True, False):
        monkeypatch.setattr(matmul, "allow_tf32", allowed)
        monkeypatch.setattr(matmul, "allow_bf16_reduced_precision_reduction", allowed)
        with torch.autocast("cuda", dtype=torch.float16):
            found = results()
        assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("number", [1e-40, 3.4e38])
def test_a_weight_out_of_range_is_multiplied_in_float32(number):
    hidden, weight, grad = made((37, 64, 211))
    weight[100, 5] = number
    lm_head, x = head(weight), hidden.clone().requires_grad_()
    logits = lm_head_logits(lm_head, x, precision="bf16x3").logits
    logits.backward(grad)

    assert logits_path(x, weight, precision="bf16x3").name == "fp32"
    assert torch.equal(logits, hidden.float() @ weight.T)
    assert torch.equal(x.grad, (grad @ weight).bfloat16())
    assert torch.equal(lm_head.weight.grad, grad.T @ hidden.float())


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_captured_graph_replays_given_parts_and_refuses_to_make_them():
    hidden, weight, _ = made((37, 64, 211))
    lm_head, parts = head(weight), weight_parts(weight)
    expected = lm_head_logits(lm_head, hidden, precision="bf16x3", weight_parts=parts).logits
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        found = lm_head_logits(lm_head, hidden, precision="bf16x3", weight_parts=parts).logits
    graph.replay()

    assert torch.equal(found, expected)
    with pytest.raises(ConfigError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        lm_head_logits(lm_head, hidden, precision="bf16x3")


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_a_head_in_training_does_not_put_kept_parts_in_a_graph():
    hidden, weight, _ = made((37, 64, 211))
    trained = LMHead.from_linear(head(weight))
    trained(hidden)
    with pytest.raises(ConfigError, match="CUDA graph"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        trained(hidden)
    frozen = LMHead.from_linear(head(weight).requires_grad_(False))
    expected = frozen(hidden)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = frozen(hidden)
    graph.replay()

    assert torch.equal(found, expected)


@pytest.mark.parametrize("precision", ["bf16x3", "bf16"])
@pytest.mark.parametrize("fused", [False, True])
def test_kept_parts_follow_training(precision, fused):
    hidden, weight, _ = made((37, 64, 211))
    heads = [
        LMHead.from_linear(head(weight), precision=precision, keep_parts=keep)
        for keep in (True, False)
    ]
    for lm_head in heads:
        optimizer = torch.optim.AdamW(lm_head.parameters(), lr=0.1, fused=fused)
        for _ in range(3):
            for _ in range(2):
                lm_head(hidden).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    assert heads[0]._kept is not None
    assert heads[1]._kept is None
    assert torch.equal(heads[0].weight, heads[1].weight)
    assert torch.equal(heads[0](hidden), heads[1](hidden))


def test_a_head_that_moves_to_the_cpu_and_back_gives_the_same():
    hidden, weight, _ = made((37, 64, 211))
    lm_head = LMHead.from_linear(head(weight))
    expected = lm_head(hidden)
    other = copy.deepcopy(lm_head)
    torch.testing.assert_close(lm_head.cpu()(hidden.cpu()), expected.cpu(), rtol=1e-4, atol=1e-5)

    assert torch.equal(lm_head.cuda()(hidden), expected)
    assert torch.equal(other(hidden), expected)


@pytest.mark.parametrize("precision", ["bf16x3", "bf16"])
def test_compiled_it_has_the_bits_of_eager_mode(precision):
    torch._dynamo.reset()
    hidden, weight, grad = made((37, 64, 211))
    results = []
    for compile_it in (False, True):
        lm_head, x = head(weight), hidden.clone().requires_grad_()

        def project(x, lm_head=lm_head):
            return lm_head_logits(lm_head, x, precision=precision).logits

        logits = (torch.compile(project, fullgraph=True) if compile_it else project)(x)
        logits.backward(grad)
        results.append((logits.detach(), x.grad, lm_head.weight.grad))

    assert all(torch.equal(left, right) for left, right in zip(*results, strict=True))
