import pytest
import torch

from automodel_fn.ops import _loss_products
from automodel_fn.ops._loss import lm_head_loss_reference
from automodel_fn.ops._loss_chunks import LossInputs, Wanted, chunked_loss
from automodel_fn.ops._loss_products import PlainProducts, SplitProducts
from automodel_fn.ops._loss_sums import WeightSum, product_dtype_of
from automodel_fn.ops._loss_terms import LossTerms, chunk_sizes

T, H, V = 6, 16, 37


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 8, 37, 64])
@pytest.mark.parametrize("num_products", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_sum_of_products_is_rounded_once(num_rows, num_products, dtype):
    torch.manual_seed(num_rows)
    products = [torch.randn(num_rows, 6) for _ in range(num_products)]
    result = torch.full((num_rows, 6), torch.nan, dtype=dtype)
    total = WeightSum(result, torch.float32, num_products=num_products)
    for product in products:
        for rows, target, is_begun in total.parts():
            target.copy_(target + product[rows] if is_begun else product[rows])
    expected = products[0]
    for product in products[1:]:
        expected = expected + product

    assert total.result() is result
    assert torch.equal(result, expected.to(dtype))


def test_half_of_the_sums_of_a_narrow_gradient_lie_in_its_own_memory():
    result = torch.empty(V, H, dtype=torch.bfloat16)
    (_, first, _), (_, rest, _) = WeightSum(result, torch.float32, num_products=2).parts()

    assert first.data_ptr() == result.data_ptr()
    assert first.dtype == rest.dtype == torch.float32
    assert (len(first), len(rest)) == (V // 2, V - V // 2)
    assert first.nbytes <= result.nbytes


def test_a_sum_of_nothing_is_zero():
    result = torch.full((V, H), torch.nan, dtype=torch.bfloat16)

    assert not WeightSum(result, torch.float32, num_products=0).result().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products_of_parts_are_those_of_float64(dtype):
    torch.manual_seed(0)
    hidden, weight = torch.randn(T, H).bfloat16(), torch.randn(V, H).to(dtype)
    gradients = torch.randn(T, V)
    rows = slice(1, 5)
    products = SplitProducts(hidden, weight)
    logits, of_hidden = torch.empty(4, V), torch.empty(4, H, dtype=torch.bfloat16)
    total = WeightSum(torch.empty(V, H), torch.float32, num_products=2)
    products.write_logits(rows, logits)
    products.write_hidden_gradient(gradients[rows], of_hidden)
    for _ in range(2):
        products.add_weight_gradient(gradients[rows], rows, total)

    wide, narrow, upstream = weight.double(), hidden.double()[rows], gradients.double()[rows]
    assert products.gradient_dtype == torch.float32
    torch.testing.assert_close(logits.double(), narrow @ wide.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(of_hidden.double(), upstream @ wide, rtol=2**-8, atol=1e-5)
    expected = 2 * upstream.t() @ narrow
    torch.testing.assert_close(total.result().double(), expected, rtol=1e-5, atol=1e-5)


def test_operands_are_rounded_to_what_was_asked_for():
    hidden, weight = torch.randn(T, H), torch.randn(V, H)
    products = PlainProducts(hidden, weight, torch.bfloat16)
    logits = torch.empty(T, V)
    products.write_logits(slice(0, T), logits)
    expected = hidden.bfloat16().float() @ weight.bfloat16().float().t()

    torch.testing.assert_close(logits, expected)
    assert products.gradient_dtype == torch.float32


def test_a_gpu_multiplies_bfloat16_as_it_is_and_nothing_in_float16():
    cuda = torch.device("cuda")

    assert product_dtype_of(torch.bfloat16, cuda) == torch.bfloat16
    assert product_dtype_of(torch.float16, cuda) == torch.float32
    assert product_dtype_of(torch.float64, cuda) == torch.float64


@pytest.mark.parametrize("num_tokens", [0, 1, 63, 64, 500, 512, 4096, 5000, 8193, 100000])
@pytest.mark.parametrize("vocabulary", [1, 32000, 128256, 10**9])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wants_weight", [True, False])
def test_what_is_held_is_bounded(num_tokens, vocabulary, dtype, wants_weight):
    sizes = chunk_sizes(num_tokens, vocabulary, dtype, None, wants_weight=wants_weight)
    num_bytes = sizes.held * vocabulary * dtype.itemsize

    assert 1 <= sizes.rows <= sizes.held <= max(num_tokens, 1)
    assert sizes.rows <= max(64, -(-num_tokens // (16 if wants_weight else 4)))
    if wants_weight:
        assert num_bytes <= (2**31 if sizes.held == num_tokens else 2**30) or sizes.held == 1
    else:
        assert sizes.held == sizes.rows


def test_many_tokens_are_divided_evenly():
    for num_tokens in (8192, 8193, 12000, 16384, 16385):
        held = chunk_sizes(num_tokens, 128256, torch.bfloat16, None).held
        num_chunks = -(-num_tokens // held)

        assert num_chunks * held - num_tokens < 128 * num_chunks


def test_logits_may_lie_where_the_only_product_will_be_written():
    result = torch.empty(V, H, dtype=torch.bfloat16)
    spare = WeightSum(result, torch.float32, num_products=1).spare(torch.float32)

    assert (spare.data_ptr(), spare.dtype) == (result.data_ptr(), torch.float32)
    assert spare.nbytes <= result.nbytes
    assert len(WeightSum(result, torch.float32, num_products=2).spare(torch.float32)) == 0


@pytest.mark.parametrize("chunk_size", [1, 7, 512, 4096, 10**6])
def test_the_chunk_that_was_asked_for_is_held(chunk_size):
    sizes = chunk_sizes(4096, 128256, torch.bfloat16, chunk_size)

    assert sizes.held == min(chunk_size, 4096)


@pytest.mark.parametrize("vocabulary", [V, 128])
@pytest.mark.parametrize("width", [4, 64, 1024])
def test_logits_in_the_memory_of_the_gradient_change_nothing(monkeypatch, vocabulary, width):
    # As on a GPU: gradients of logits are narrower than logits.
    monkeypatch.setattr(_loss_products, "product_dtype_of", lambda dtype, device: dtype)
    torch.manual_seed(0)
    hidden = torch.randn(100, width).bfloat16() / width**0.5
    weight, labels = torch.randn(vocabulary, width).bfloat16(), torch.randint(0, vocabulary, (100,))
    scale = torch.tensor(0.01)
    inputs = LossInputs(hidden, weight=weight, bias=None, labels=labels, scale=scale)
    terms = LossTerms(ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=None)
    wanted = Wanted(True, weight=True, bias=False)
    found = chunked_loss(inputs, terms, wanted, operand_dtype=torch.bfloat16)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    loss = lm_head_loss_reference(*exact, labels)
    loss.backward()

    torch.testing.assert_close(found.losses.double().mean(), loss.detach(), rtol=1e-6, atol=0)
    for ours, theirs in zip((found.of_hidden, found.of_weight), exact, strict=True):
        assert (ours.double() - theirs.grad).norm() < 0.004 * theirs.grad.norm()
