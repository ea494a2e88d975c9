import pytest
import torch
from torch import nn

from automodel_fn import apply, audit, bf16, cast_plan, temporary_cast

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32), nn.LSTM(32, 16)).cuda()


def bits(model):
    return [(t.dtype, t.detach().view(torch.uint8).clone()) for t in model.state_dict().values()]


def same(left, right):
    return all(a == c and torch.equal(b, d) for (a, b), (c, d) in zip(left, right, strict=True))


@pytest.mark.parametrize("keep_originals", [False, True])
def test_a_cast_on_the_gpu_is_that_of_each_tensor(model, keep_originals):
    expected = {
        name: t.detach().clone() if name.startswith("1.") else t.detach().to(bf16)
        for name, t in model.state_dict().items()
    }
    report = apply(
        cast_plan(model, bf16, keep_fp32="1"), keep_originals=keep_originals, checksum=True
    )

    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.view(torch.uint8), expected[name].view(torch.uint8))
    assert audit(model, report, bits=True) == ()


def test_undo_and_the_end_of_a_temporary_cast_bring_every_bit_back(model):
    before = bits(model)
    apply(cast_plan(model, bf16), keep_originals=True).undo()
    assert same(bits(model), before)

    with temporary_cast(model, bf16):
        assert {p.dtype for p in model.parameters()} == {bf16}
    assert same(bits(model), before)


def test_checksums_are_the_same_on_cpu_and_gpu(model):
    plan = cast_plan(model, bf16)
    on_gpu = apply(plan, checksum=True).checksums
    on_cpu = apply(cast_plan(model.cpu(), bf16), checksum=True).checksums

    assert dict(on_gpu) == dict(on_cpu)


def test_streaming_needs_no_more_than_the_largest_tensor():
    model = nn.ModuleList([nn.Linear(1024, 1024, bias=False) for _ in range(16)]).cuda()
    plan = cast_plan(model, bf16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    apply(plan)

    largest, total = 4 * 1024**2, 16 * 4 * 1024**2
    assert torch.cuda.max_memory_allocated() - before <= largest + total // 20
