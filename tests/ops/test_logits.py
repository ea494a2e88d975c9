import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

from automodel_fn import ConfigError, LMHeadOutput, lm_head_logits
from automodel_fn.ops._logits import lm_head_logits_reference

H, V = 16, 11
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def same(left, right):
    kind = INTEGERS[left.dtype.itemsize]
    return left.dtype == right.dtype and torch.equal(
        left.detach().contiguous().view(kind), right.detach().contiguous().view(kind)
    )


def head(dtype=torch.bfloat16, bias=False):
    torch.manual_seed(0)
    return nn.Linear(H, V, bias=bias, dtype=dtype)


def hidden(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(1)).to(dtype)


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 2


class Quantized(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(V, H).to(dtype), requires_grad=False)
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return x @ self.weight.to(x.dtype).T


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5), (5,), (1, 0), (0,)])
def test_a_head_in_its_own_dtype_gives_what_it_gives_when_called(shape, dtype, bias):
    lm_head, x = head(dtype, bias), hidden(*shape, dtype=dtype)
    output = lm_head_logits(lm_head, x)
    assert same(output.logits, lm_head(x))
    assert output.hidden_states is None


@pytest.mark.parametrize(("dtype", "stored"), [(DTYPES[0], DTYPES[2]), (DTYPES[2], DTYPES[0])])
def test_the_hidden_states_are_cast_to_the_dtype_of_the_head(dtype, stored):
    lm_head, x = head(stored), hidden(2, 5, dtype=dtype)
    assert same(lm_head_logits(lm_head, x).logits, lm_head(x.to(stored)))


def test_without_a_head_the_hidden_states_pass_through_whole():
    x = hidden(2, 5)
    output = lm_head_logits(None, x, logits_to_keep=1, precision="fp32", logits_dtype="fp32")
    assert output.logits is x
    packed = lm_head_logits(None, hidden(5), is_thd=True, output_hidden_states=True)
    assert packed.logits.shape == packed.hidden_states.shape == (1, 5, H)


@pytest.mark.parametrize("shape", [(2, 5), (5,)])
@pytest.mark.parametrize("keep", [1, 3, 4, 5])
def test_an_int_keeps_that_many_last_positions(shape, keep):
    lm_head, x = head(torch.float32), hidden(*shape, dtype=torch.float32)
    output = lm_head_logits(lm_head, x, logits_to_keep=keep, output_hidden_states=True)
    assert same(output.logits, lm_head(x[..., 5 - keep :, :]))
    assert output.hidden_states is x


@pytest.mark.parametrize("shape", [(2, 5), (5,)])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.uint8])
@pytest.mark.parametrize("positions", [[0], [4, 0, 0], [], [1, 2]])
def test_a_tensor_keeps_the_positions_that_it_names(shape, dtype, positions):
    lm_head, x = head(torch.float32), hidden(*shape, dtype=torch.float32)
    keep = torch.tensor(positions, dtype=dtype)
    found = lm_head_logits(lm_head, x, logits_to_keep=keep).logits
    assert same(found, lm_head(x[..., positions, :]))


@pytest.mark.parametrize("keep", [0, 5])
def test_nothing_is_sliced_where_every_position_is_kept(keep):
    seen = []
    lm_head = head()
    lm_head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = hidden(2, 5)
    lm_head_logits(lm_head, x, logits_to_keep=keep)
    assert seen[0] is x


@pytest.mark.parametrize(
    "keep",
    [
        -1,
        6,
        True,
        False,
        1.0,
        None,
        slice(None),
        torch.tensor(1),
        torch.tensor([[1]]),
        torch.tensor([1.0]),
        torch.tensor([True, False, True, False, True]),
        torch.tensor([5]),
        torch.tensor([-1, 0]),
    ],
    ids=repr,
)
def test_what_names_no_positions_is_an_error(keep):
    with pytest.raises(ConfigError, match="logits_to_keep"):
        lm_head_logits(head(), hidden(2, 5), logits_to_keep=keep)


@pytest.mark.parametrize(
    "x", [torch.ones(H), torch.ones(1, 1, 1, H), torch.ones(2, H, dtype=torch.int64)]
)
def test_hidden_states_of_another_shape_or_kind_are_an_error(x):
    with pytest.raises(ConfigError, match="hidden_states"):
        lm_head_logits(head(), x)


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "tf32"},
        {"precision": torch.float32},
        {"logits_dtype": "int8"},
        {"logits_dtype": torch.float8_e4m3fn},
        {"logits_dtype": "nonsense"},
    ],
)
def test_other_options_are_errors_also_without_a_head(options):
    for lm_head in (None, head()):
        with pytest.raises(ConfigError, match=r"precision|dtype"):
            lm_head_logits(lm_head, hidden(2, 5), **options)


def test_packed_logits_and_hidden_states_get_a_batch_dimension():
    lm_head, x = head(), hidden(5)
    output = lm_head_logits(lm_head, x, is_thd=True, logits_to_keep=2, output_hidden_states=True)
    assert output.logits.shape == (1, 2, V)
    assert output.hidden_states.shape == (1, 5, H)
    whole = lm_head_logits(lm_head, hidden(1, 5), is_thd=True, output_hidden_states=True)
    assert whole.logits.shape == (1, 5, V)
    assert whole.hidden_states.shape == (1, 5, H)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp32_multiplies_in_float32_whatever_is_stored(dtype, stored, bias):
    lm_head, x = head(stored, bias), hidden(2, 5, dtype=dtype)
    found = lm_head_logits(lm_head, x, precision="fp32").logits
    bias32 = lm_head.bias.float() if bias else None
    assert same(found, functional.linear(x.float(), lm_head.weight.float(), bias32))
    assert lm_head.weight.dtype == stored


def test_fp32_is_more_exact_than_the_dtype_of_the_head():
    lm_head, x = head(), hidden(4, 5)
    exact = lm_head_logits_reference(lm_head, x)
    wide = lm_head_logits(lm_head, x, precision="fp32").logits
    narrow = lm_head_logits(lm_head, x).logits
    assert (wide - exact).abs().max() < 1e-6 < 1e-3 < (narrow - exact).abs().max()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("keep", [0, 2, torch.tensor([4, 0])])
def test_the_reference_is_the_sum_of_products_of_each_kept_position(keep, bias):
    lm_head, x = head(bias=bias), hidden(2, 5)
    found = lm_head_logits_reference(lm_head, x, logits_to_keep=keep)

    positions = keep.tolist() if isinstance(keep, torch.Tensor) else list(range(5))[-keep:]
    assert found.shape == (2, len(positions), V)
    assert found.dtype == torch.float64
    for place, position in enumerate(positions):
        products = x[:, position, None].double() * lm_head.weight.double()
        offset = lm_head.bias.double() if bias else 0
        torch.testing.assert_close(
            found[:, place], products.sum(-1) + offset, rtol=1e-13, atol=1e-13
        )


def test_the_gradient_reaches_a_narrow_weight_in_its_own_dtype():
    embedding = nn.Embedding(V, H, dtype=torch.bfloat16)
    lm_head = head(bias=True)
    lm_head.weight = embedding.weight
    x = hidden(2, 5).requires_grad_()
    lm_head_logits(lm_head, x, precision="fp32").logits.sum().backward()
    assert embedding.weight.grad.dtype == lm_head.bias.grad.dtype == torch.bfloat16
    assert x.grad.dtype == torch.bfloat16
    expected = x.detach().double().sum((0, 1)).expand(V, H)
    torch.testing.assert_close(embedding.weight.grad.double(), expected, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_an_fp32_head_rounded_to_the_hidden_dtype_is_the_original(dtype):
    lm_head, x = head(torch.float32), hidden(2, 5, dtype=dtype)
    found = lm_head_logits(lm_head, x, precision="fp32", logits_dtype=dtype).logits
    assert same(found, lm_head(x.float()).to(dtype))


@pytest.mark.parametrize("logits_dtype", [torch.float16, "bf16", "float32"])
def test_logits_are_rounded_once_to_the_dtype_that_is_asked_for(logits_dtype):
    lm_head, x = head(), hidden(2, 5)
    wide = lm_head_logits(lm_head, x, precision="fp32").logits
    found = lm_head_logits(lm_head, x, precision="fp32", logits_dtype=logits_dtype).logits
    assert same(found, wide.to(found.dtype))


def test_a_float64_head_computes_in_float64():
    lm_head, x = head(torch.float64), hidden(2, 5)
    assert same(lm_head_logits(lm_head, x, precision="fp32").logits, lm_head(x.double()))


def test_fp32_is_not_undone_by_autocast():
    lm_head, x = head(torch.float32), hidden(2, 5)
    expected = lm_head(x.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lm_head_logits(lm_head, x, precision="fp32").logits
        assert lm_head_logits(lm_head, x).logits.dtype == torch.bfloat16
    assert same(found, expected)


def test_meta_tensors_give_shapes_and_dtypes():
    lm_head = nn.Linear(H, V, device="meta", dtype=torch.bfloat16)
    x = torch.empty(2, 5, H, device="meta")
    found = lm_head_logits(lm_head, x, precision="fp32", logits_to_keep=torch.tensor([0])).logits
    assert (found.shape, found.dtype, found.device.type) == ((2, 1, V), torch.float32, "meta")


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
def test_a_wrapped_head_is_called_and_computes_in_the_dtype_of_its_weights(stored):
    wrapped, x = Wrapped(head(stored, bias=True)), hidden(2, 5, dtype=torch.float32)
    assert same(lm_head_logits(wrapped, x).logits, wrapped(x.to(stored)))
    inner = wrapped.inner
    wide = functional.linear(x, inner.weight.float(), inner.bias.float()) * 2
    assert same(lm_head_logits(wrapped, x, precision="fp32").logits, wide)
    assert inner.weight.dtype == stored


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_the_hooks_of_a_head_run(precision):
    lm_head, seen = head(), []
    lm_head.register_forward_hook(lambda module, args, output: seen.append(args[0].dtype))
    lm_head_logits(lm_head, hidden(2, 5), precision=precision)
    assert seen == [torch.float32 if precision else torch.bfloat16]


@pytest.mark.parametrize("precision", ["fp32", "bf16x3", "bf16"])
def test_hooks_of_every_module_run_on_a_head_too(precision):
    seen = []
    handle = register_module_forward_hook(lambda module, args, output: seen.append(type(module)))
    try:
        lm_head_logits(head(torch.float32), hidden(2, 5), precision=precision)
    finally:
        handle.remove()
    assert seen == [nn.Linear]


def test_a_forward_that_was_replaced_runs():
    lm_head = head()
    lm_head.forward = lambda x: functional.linear(x, lm_head.weight) + 1
    found = lm_head_logits(lm_head, hidden(2, 5), precision="fp32").logits
    plain = lm_head_logits(head(), hidden(2, 5), precision="fp32").logits
    torch.testing.assert_close(found, plain + 1)


def test_a_parametrized_weight_is_computed_once():
    calls = []

    class Doubled(nn.Module):
        def forward(self, weight):
            calls.append(weight.dtype)
            return weight * 2

    lm_head = head()
    parametrize.register_parametrization(lm_head, "weight", Doubled())
    calls.clear()
    lm_head_logits(lm_head, hidden(2, 5))
    assert calls == [torch.bfloat16]
    lm_head_logits(lm_head, hidden(2, 5), precision="fp32")
    assert calls == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float8_e4m3fn])
def test_a_quantized_head_gets_its_input_as_it_is(dtype):
    for lm_head in (Quantized(dtype), Wrapped(Quantized(dtype))):
        x = hidden(2, 5)
        lm_head_logits(lm_head, x)
        inner = getattr(lm_head, "inner", lm_head)
        assert inner.seen[0] is x
        with pytest.raises(ConfigError, match=f"found {str(dtype)[6:]}"):
            lm_head_logits(lm_head, x, precision="fp32")


def test_a_head_without_weights_gets_its_input_as_it_is():
    x = hidden(2, 5)
    assert lm_head_logits(nn.Identity(), x).logits is x
    assert lm_head_logits(nn.Identity(), x, precision="fp32").logits.dtype == torch.float32


def test_a_weight_that_is_a_buffer_or_an_attribute_says_the_dtype():
    class Tied(nn.Module):
        def forward(self, x):
            return functional.linear(x, self.weight)

    plain, x = Tied(), hidden(2, 5, dtype=torch.float32)
    plain.weight = head().weight.detach()
    assert lm_head_logits(plain, x).logits.dtype == torch.bfloat16
    held = Tied()
    held.register_buffer("weight", head().weight.detach())
    assert lm_head_logits(held, x).logits.dtype == torch.bfloat16
    assert lm_head_logits(held, x, precision="fp32").logits.dtype == torch.float32
    assert held.weight.dtype == torch.bfloat16


def test_it_compiles_in_one_graph_and_gives_the_same(graphs):
    lm_head = head()

    def project(x, keep):
        return lm_head_logits(
            lm_head, x, logits_to_keep=keep, precision="fp32", output_hidden_states=True
        )

    compiled = torch.compile(project, backend=graphs, fullgraph=True)
    for keep in (0, 2, torch.tensor([1, 3])):
        x = hidden(2, 5)
        found, expected = compiled(x, keep), project(x, keep)
        assert isinstance(found, LMHeadOutput)
        assert same(found.logits, expected.logits)
        assert same(found.hidden_states, x)


def test_an_output_is_frozen_and_a_tree_of_tensors():
    output = LMHeadOutput(torch.ones(1), torch.zeros(1))
    with pytest.raises(AttributeError):
        output.logits = torch.zeros(1)
    doubled = torch.utils._pytree.tree_map(lambda tensor: tensor * 2, output)
    assert (doubled.logits.item(), doubled.hidden_states.item()) == (2.0, 0.0)
    assert (
        torch.utils._pytree.tree_map(lambda t: t, LMHeadOutput(output.logits)).hidden_states is None
    )
