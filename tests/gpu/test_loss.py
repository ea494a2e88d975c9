import pytest
import torch
from torch.nn import functional

from automodel_fn import lm_head_loss, lm_head_loss_kernel
from automodel_fn.ops._loss import lm_head_loss_reference
from automodel_fn.testing import check_lm_head_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Inductor imports parts of torch that warn.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

OPTIONS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "shift": {"shift": True, "num_items_in_batch": 77},
    "all": {"label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 5.0},
}
by_options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
by_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


def made(dtype, shape=(3, 50), hidden=64, vocabulary=5000):
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"device": "cuda", "generator": generator}
    states = torch.randn(*shape, hidden, **options) / 4
    weight, bias = torch.randn(vocabulary, hidden, **options), torch.randn(vocabulary, **options)
    labels = torch.randint(0, vocabulary, shape, **options)
    labels.view(-1)[3:9] = -100
    return states.to(dtype), weight.to(dtype), labels, bias.to(dtype)


def leaves(*tensors):
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def error(found, exact):
    return ((found.double() - exact.double()).norm() / exact.double().norm()).item()


@by_options
@by_dtype
@pytest.mark.parametrize("vocabulary", [37, 5000, 50257])
def test_the_law_of_the_loss_holds(dtype, options, vocabulary):
    hidden, weight, labels, bias = made(dtype, vocabulary=vocabulary)
    for chunk_size in (None, 32, 7):
        check_lm_head_loss(hidden, weight, labels, bias=bias, chunk_size=chunk_size, **options)
    check_lm_head_loss(hidden, weight, labels, **options)


@by_options
def test_in_float64_torch_computes_the_same(options):
    hidden, weight, labels, _ = made(torch.float64)
    found = lm_head_loss(hidden, weight, labels, **options).loss

    assert lm_head_loss_kernel(hidden, weight).name == "torch"
    torch.testing.assert_close(found, lm_head_loss_reference(hidden, weight, labels, **options))


@by_dtype
def test_the_kernel_and_torch_compute_the_same(dtype, monkeypatch):
    from automodel_fn.ops import _loss_terms, _loss_triton

    hidden, weight, labels, bias = made(dtype)
    assert lm_head_loss_kernel(hidden, weight).name == "triton"
    results = []
    for write in (_loss_triton.write_token_losses, _loss_terms.write_token_losses):
        monkeypatch.setattr(_loss_triton, "write_token_losses", write)
        own = leaves(hidden, weight, bias)
        loss = lm_head_loss(*own[:2], labels, bias=own[2], **OPTIONS["all"]).loss
        results.append((loss.detach(), *torch.autograd.grad(loss, own)))

    (loss, *ours), (expected, *theirs) = results
    assert error(loss, expected) < 1e-5
    for left, right in zip(ours, theirs, strict=True):
        assert error(left, right) < {torch.float32: 1e-6}.get(dtype, 4e-3)


def test_gradients_are_as_close_to_float64_as_those_of_all_logits_in_fp32():
    hidden, weight, labels, _ = made(torch.float32, (512,), 512, 32000)
    wide, unfused, own = (
        leaves(hidden.to(d), weight.to(d)) for d in (torch.float64, torch.float32, torch.float32)
    )
    functional.cross_entropy(functional.linear(*wide), labels).backward()
    functional.cross_entropy(functional.linear(*unfused), labels).backward()
    lm_head_loss(*own, labels, chunk_size=64).loss.backward()

    for exact, theirs, ours in zip(wide, unfused, own, strict=True):
        assert error(ours.grad, exact.grad) <= 1.5 * error(theirs.grad, exact.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_of_parts_lose_little(dtype):
    hidden, weight, labels, _ = made(torch.bfloat16, (512,), 512, 32000)
    weight = torch.randn_like(weight, dtype=torch.float32).to(dtype)
    own, exact = leaves(hidden, weight), leaves(hidden.double(), weight.double())
    found = lm_head_loss(*own, labels, precision="bf16x3", chunk_size=200).loss
    expected = lm_head_loss_reference(*exact, labels)
    found.backward()
    expected.backward()

    assert error(found.detach(), expected.detach()) < 1e-5
    assert error(own[0].grad, exact[0].grad) < 3e-3
    limits = {torch.bfloat16: 3e-3, torch.float16: 5e-4, torch.float32: 5e-5}
    assert error(own[1].grad, exact[1].grad) < limits[dtype]


def test_many_chunks_lose_no_bits_of_a_bf16_gradient():
    hidden, weight, labels, _ = made(torch.bfloat16, (4096,), 64, 1000)
    exact = leaves(hidden.double(), weight.double())
    lm_head_loss_reference(*exact, labels).backward()
    errors = []
    for chunk_size in (None, 64):
        own = leaves(hidden, weight)
        lm_head_loss(*own, labels, chunk_size=chunk_size).loss.backward()
        errors.append(error(own[1].grad, exact[1].grad))

    assert errors[1] <= 1.05 * errors[0]


def test_the_extra_memory_is_at_most_a_quarter_of_that_of_all_logits():
    hidden, weight, labels, _ = made(torch.bfloat16, (4096,), 256, 128256)
    own = leaves(hidden, weight)

    def extra(loss):
        for _ in range(2):
            own[0].grad = own[1].grad = None
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            loss().backward()
            peak = torch.cuda.max_memory_allocated() - before
        return peak - sum(leaf.grad.nbytes for leaf in own)

    def unfused():
        return functional.cross_entropy(functional.linear(*own).float(), labels)

    assert 4 * extra(lambda: lm_head_loss(*own, labels).loss) <= extra(unfused)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("precision", [None, "bf16x3"])
def test_nothing_waits_for_the_gpu(precision):
    hidden, weight, labels, _ = made(torch.bfloat16)
    own = leaves(hidden, weight)
    lm_head_loss(*own, labels, shift=True, precision=precision).loss.backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = lm_head_loss(*own, labels, shift=True, precision=precision, chunk_size=64).loss
        (loss / 4).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_label_outside_of_the_vocabulary_makes_nan():
    hidden, weight, labels, _ = made(torch.bfloat16)
    labels[1, 1] = 5000
    own = leaves(hidden, weight)
    losses = lm_head_loss(hidden, weight, labels, reduction="none").loss
    lm_head_loss(*own, labels).loss.backward()

    assert losses.isnan().nonzero().tolist() == [[1, 1]]
    assert own[0].grad[1, 1].isnan().all()
    assert not own[0].grad[0].isnan().any()


@by_options
def test_compiled_it_gives_the_same(options):
    torch._dynamo.reset()
    hidden, weight, labels, _ = made(torch.bfloat16)
    plain, traced = leaves(hidden, weight), leaves(hidden, weight)

    def loss(hidden, weight):
        return lm_head_loss(hidden, weight, labels, **options).loss.sum() * 3

    found = torch.compile(loss, fullgraph=True)(*traced)
    expected = loss(*plain)
    found.backward()
    expected.backward()

    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(traced, plain, strict=True):
        assert error(ours.grad, theirs.grad) < 4e-3


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node.s stream")  # of leaves made before
def test_a_cuda_graph_can_record_it():
    hidden, weight, labels, _ = made(torch.bfloat16)
    own = leaves(hidden, weight)

    def step():
        return lm_head_loss(*own, labels).loss, *torch.autograd.grad(
            lm_head_loss(*own, labels).loss, own
        )

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        recorded = step()
    with torch.no_grad():
        own[0].copy_(own[0].flip(0))
    graph.replay()
    for ours, theirs in zip(recorded, step(), strict=True):
        assert torch.equal(ours, theirs)


def test_autocast_multiplies_in_its_dtype():
    hidden, weight, labels, _ = made(torch.float32)
    narrow = lm_head_loss(hidden.bfloat16(), weight.bfloat16(), labels).loss
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert torch.equal(lm_head_loss(hidden, weight, labels).loss, narrow)
