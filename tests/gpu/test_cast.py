import pytest
import torch
from torch import nn

from automodel_fn import apply, audit, bf16, cast_plan, fp16, temporary_cast

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


def large(count, dtype=torch.float32):
    """Tensors whose casts take a kernel each: any bits at all, so also NaN and subnormals."""
    shape = 2048, 2049
    if dtype == torch.float32:
        bits = [torch.randint(-(2**31), 2**31, shape, device="cuda") for _ in range(count)]
        return [one.to(torch.int32).view(dtype) for one in bits]
    bits = [torch.randint(-(2**15), 2**15, shape, device="cuda") for _ in range(count)]
    return [one.to(torch.int16).view(dtype) for one in bits]


@pytest.mark.parametrize("dtype", [bf16, fp16])
@pytest.mark.parametrize("keep_originals", [False, True])
def test_large_tensors_that_are_cast_at_once_have_the_bits_of_each_alone(dtype, keep_originals):
    tensors = large(20)
    tensors[7] = tensors[7].t()
    model = nn.ParameterList([nn.Parameter(tensor.clone()) for tensor in tensors])
    report = apply(cast_plan(model, dtype), keep_originals=keep_originals)

    for parameter, tensor in zip(model, tensors, strict=True):
        alone = tensor.to(dtype)
        assert parameter.stride() == alone.stride()
        assert torch.equal(parameter.detach().view(torch.int16), alone.view(torch.int16))
    assert len({p.untyped_storage().data_ptr() for p in model}) == len(tensors)
    if keep_originals:
        report.undo()
        for parameter, tensor in zip(model, tensors, strict=True):
            assert torch.equal(parameter.detach().view(torch.int32), tensor.view(torch.int32))


def test_what_follows_a_cast_at_once_waits_for_it_also_on_a_stream_of_the_callers():
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(5):
            tensors = large(16)
            model = nn.ParameterList([nn.Parameter(tensor.clone()) for tensor in tensors])
            apply(cast_plan(model, bf16))
            sums = torch.stack([p.detach().view(torch.int16).long().sum() for p in model])
            alone = torch.stack([t.to(bf16).view(torch.int16).long().sum() for t in tensors])
            assert torch.equal(sums, alone)


@pytest.mark.parametrize("narrow", [bf16, fp16])
def test_large_tensors_become_wider_exactly(narrow):
    tensors = large(12, narrow)
    model = nn.ParameterList([nn.Parameter(tensor.clone()) for tensor in tensors])
    apply(cast_plan(model, torch.float32))
    for parameter, tensor in zip(model, tensors, strict=True):
        assert torch.equal(parameter.detach().view(torch.int32), tensor.float().view(torch.int32))


def test_streaming_of_large_tensors_needs_no_more_than_the_largest_and_one_percent():
    model = nn.ParameterList(
        [nn.Parameter(torch.ones(2048, 4096, device="cuda")) for _ in range(80)]
    )
    plan = cast_plan(model, bf16)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    apply(plan)

    largest, total = 4 * 2048 * 4096, 80 * 4 * 2048 * 4096
    assert torch.cuda.max_memory_allocated() - before <= largest + total // 100


def test_a_large_cast_that_runs_out_of_memory_is_finished(monkeypatch):
    model = nn.ParameterList([nn.Parameter(tensor) for tensor in large(24)])
    expected = [p.detach().to(bf16) for p in model]
    calls, empty_like = [], torch.empty_like

    def fails_once(*args, **kwargs):
        calls.append(None)
        if len(calls) == 6:
            raise torch.cuda.OutOfMemoryError
        return empty_like(*args, **kwargs)

    monkeypatch.setattr(torch, "empty_like", fails_once)
    with pytest.raises(torch.cuda.OutOfMemoryError):
        apply(cast_plan(model, bf16))

    for parameter, alone in zip(model, expected, strict=True):
        assert torch.equal(parameter.detach().view(torch.int16), alone.view(torch.int16))


def test_a_plan_that_was_made_before_its_model_moved_to_the_gpu_holds_there():
    model = nn.Sequential(nn.Linear(64, 32), nn.LayerNorm(32))
    plan = cast_plan(model, bf16, keep_fp32="1")
    objects = list(map(id, model.parameters()))
    model.cuda()
    assert objects == list(map(id, model.parameters()))
    expected = [model[0].weight.detach().to(bf16), model[1].weight.detach().clone()]

    apply(plan)

    for tensor, wanted in zip((model[0].weight, model[1].weight), expected, strict=True):
        assert tensor.is_cuda
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor.detach().view(torch.uint8), wanted.view(torch.uint8))
