import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_fn import ConfigError, lm_head_loss

H, V = 16, 37
OPERATOR = "automodel_fn.lm_head_loss"


def made(*shape, dtype=torch.float32):
    hidden = torch.randn(*shape, H).to(dtype).requires_grad_()
    weight = torch.randn(V, H).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, V, shape)


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_compiled_it_is_one_operator_with_the_same_results(reduction, dtype):
    def loss(hidden, weight, labels, bias):
        options = {"reduction": reduction, "z_loss": 0.1, "softcap": 5.0, "chunk_size": 4}
        return lm_head_loss(hidden, weight, labels, bias=bias, shift=True, **options).loss

    hidden, weight, labels = made(2, 9, dtype=dtype)
    leaves = (hidden, weight, torch.randn(V).to(dtype).requires_grad_())
    plain = loss(*leaves[:2], labels, leaves[2])
    found = torch.compile(loss, backend="aot_eager", fullgraph=True)(*leaves[:2], labels, leaves[2])
    upstream = torch.rand_like(plain)

    assert torch.equal(found, plain)
    expected = torch.autograd.grad(plain, leaves, upstream)
    for ours, theirs in zip(torch.autograd.grad(found, leaves, upstream), expected, strict=True):
        assert ours.dtype == dtype
        torch.testing.assert_close(ours, theirs)


def test_fifty_lengths_need_two_graphs(graphs):
    compiled = torch.compile(
        lambda *given: lm_head_loss(*given, shift=True).loss, backend=graphs, fullgraph=True
    )
    for length in range(2, 52):
        compiled(*made(2, length)).backward()

    assert len(graphs.graphs) <= 2
    assert all(any(OPERATOR in target for target in targets) for targets in graphs.targets)


def test_a_count_that_changes_with_every_batch_needs_two_graphs(graphs):
    compiled = torch.compile(
        lambda items, *given: lm_head_loss(*given, num_items_in_batch=items).loss,
        backend=graphs,
        fullgraph=True,
    )
    given = made(2, 5)
    for items in range(100, 120):
        plain = lm_head_loss(*given, num_items_in_batch=items).loss
        torch.testing.assert_close(compiled(items, *given), plain)

    assert len(graphs.graphs) <= 2


def test_by_inductor_it_gives_the_same():
    given = made(2, 9)
    compiled = torch.compile(lambda *given: lm_head_loss(*given).loss * 2, fullgraph=True)
    found, plain = compiled(*given), lm_head_loss(*given).loss * 2

    torch.testing.assert_close(found, plain)
    expected = torch.autograd.grad(plain, given[:2])
    torch.testing.assert_close(torch.autograd.grad(found, given[:2]), expected)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fake_tensors_go_through_the_operator(reduction):
    with FakeTensorMode():
        hidden, weight, labels = made(2, 9, dtype=torch.bfloat16)
        loss = lm_head_loss(hidden, weight, labels, reduction=reduction).loss
        loss.sum().backward()

    assert (hidden.grad.shape, hidden.grad.dtype) == (hidden.shape, torch.bfloat16)
    assert (weight.grad.shape, weight.grad.dtype) == (weight.shape, torch.bfloat16)


def test_a_dispatch_mode_sees_the_operator():
    class Seen(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.names = set()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.names.add(str(func))
            return func(*args, **(kwargs or {}))

    given = made(2, 9)
    with Seen() as seen:
        lm_head_loss(*given).loss.backward()

    assert f"{OPERATOR}.default" in seen.names


def test_within_a_transform_of_torch_func_it_is_an_error():
    hidden, weight, labels = made(2, 9)
    with pytest.raises(ConfigError, match=r"within a transform of torch\.func"):
        torch.func.grad(lambda weight: lm_head_loss(hidden, weight, labels).loss)(weight)


@pytest.mark.parametrize("is_summed", [True, False])
def test_the_operator_has_no_second_derivative_either(is_summed):
    from automodel_fn.ops._loss_op import traced_loss

    hidden, weight, labels = made(7)
    given = (hidden, weight, None, labels, torch.ones(()), (-100, 0.0, 0.0, None))
    loss, _ = traced_loss(*given, torch.float32, False, None, is_summed=is_summed)
    (grad, _) = torch.autograd.grad(loss.sum(), (hidden, weight), create_graph=True)

    with pytest.raises(ConfigError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("is_summed", [True, False])
def test_the_operator_passes_the_checks_of_torch(is_summed):
    hidden, weight, labels = made(7)
    arguments = (hidden, weight, None, labels, torch.ones(()), -100, 0.1, 0.0, None)
    wants = [is_summed, is_summed, False]
    torch.library.opcheck(
        torch.ops.automodel_fn.lm_head_loss.default,
        (*arguments, torch.float32, False, 3, is_summed, wants),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
