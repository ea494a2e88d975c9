import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from automodel_fn import (
    ConfigError,
    LMHead,
    LogitsPath,
    WeightParts,
    lm_head_logits,
    logits_path,
    weight_parts,
)
from automodel_fn.ops import _logits_product

H, V = 16, 11
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
in_bf16 = pytest.mark.parametrize("precision", ["bf16x3", "bf16"])
OPERATOR = "automodel_fn.logits_product"


def same(left, right):
    return left.dtype == right.dtype and torch.equal(left, right)


def head(dtype=torch.float32, bias=False):
    torch.manual_seed(0)
    return nn.Linear(H, V, bias=bias, dtype=dtype)


def hidden(*shape):
    return torch.randn(*shape, H, generator=torch.Generator().manual_seed(1)).bfloat16()


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * 2


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("shape", [(2, 5), (5,), (1, 0), (0,)])
def test_logits_are_those_of_float32_on_the_cpu(shape, stored, bias):
    lm_head, x = head(stored, bias), hidden(*shape)
    found = lm_head_logits(lm_head, x, precision="bf16x3").logits
    expected = lm_head_logits(lm_head, x, precision="fp32").logits

    assert found.shape == (*shape, V)
    assert same(found, expected)


@pytest.mark.parametrize("stored", DTYPES)
def test_bf16_rounds_the_weight_and_nothing_else(stored):
    lm_head, x = head(stored, True), hidden(2, 5)
    found = lm_head_logits(lm_head, x, precision="bf16").logits
    exact = functional.linear(x.double(), lm_head.weight.bfloat16().double(), lm_head.bias.double())

    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=1e-6)


@in_bf16
@pytest.mark.parametrize("keep", [0, 2, torch.tensor([3, 0])])
def test_kept_positions_are_those_of_all_logits(precision, keep):
    lm_head, x = head(), hidden(2, 5)
    every = lm_head_logits(lm_head, x, precision=precision).logits
    rows = {0: slice(None), 2: slice(3, 5)}.get(keep, keep) if isinstance(keep, int) else keep
    found = lm_head_logits(lm_head, x, precision=precision, logits_to_keep=keep).logits

    torch.testing.assert_close(found, every[:, rows], rtol=1e-6, atol=1e-6)


@in_bf16
@pytest.mark.parametrize("logits_dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_logits_are_rounded_once_to_the_dtype_that_is_asked_for(precision, logits_dtype):
    lm_head, x = head(), hidden(2, 5)
    wide = lm_head_logits(lm_head, x, precision=precision).logits
    found = lm_head_logits(lm_head, x, precision=precision, logits_dtype=logits_dtype).logits

    assert same(found, wide.to(logits_dtype))


@in_bf16
@pytest.mark.parametrize("stored", DTYPES)
def test_gradients_come_in_the_dtypes_of_what_they_are_of(precision, stored):
    lm_head, x = head(stored, True), hidden(2, 5).requires_grad_()
    lm_head_logits(lm_head, x, precision=precision, logits_to_keep=3).logits.sum().backward()

    kept = x.detach()[:, 2:].double()
    assert x.grad.dtype == torch.bfloat16
    assert not x.grad[:, :2].any()
    assert lm_head.weight.grad.dtype == lm_head.bias.grad.dtype == stored
    expected = kept.sum((0, 1)).expand(V, H).to(stored)
    torch.testing.assert_close(lm_head.weight.grad, expected)
    torch.testing.assert_close(lm_head.bias.grad, torch.full((V,), 6.0, dtype=stored))


@in_bf16
def test_the_gradient_of_a_float32_bias_is_summed_in_float32(precision):
    lm_head, grad = head(bias=True), torch.ones(301, V, dtype=torch.bfloat16)
    logits = lm_head_logits(lm_head, hidden(301), precision=precision, logits_dtype="bf16").logits
    logits.backward(grad)

    assert torch.equal(lm_head.bias.grad, torch.full((V,), 301.0))


def test_a_tied_weight_gets_one_gradient_and_stays_as_it_is():
    embedding, lm_head = nn.Embedding(V, H, dtype=torch.bfloat16), head(torch.bfloat16)
    lm_head.weight = embedding.weight
    before = embedding.weight.detach().clone()
    x = embedding(torch.tensor([[1, 2, 3]]))
    lm_head_logits(lm_head, x, precision="bf16x3").logits.sum().backward()

    assert lm_head.weight is embedding.weight
    assert same(embedding.weight.detach(), before)
    assert embedding.weight.grad.dtype == torch.bfloat16


@in_bf16
def test_parts_that_are_given_make_the_same_logits_and_gradients(precision):
    results = []
    for is_given in (False, True):
        lm_head, x = head(bias=True), hidden(2, 5).requires_grad_()
        parts = weight_parts(lm_head.weight) if is_given else None
        logits = lm_head_logits(lm_head, x, precision=precision, weight_parts=parts).logits
        logits.square().sum().backward()
        results.append((logits.detach(), x.grad, lm_head.weight.grad, lm_head.bias.grad))

    assert all(same(left, right) for left, right in zip(*results, strict=True))


def test_neither_autocast_nor_the_dtype_of_the_products_changes_a_bit():
    lm_head = head()
    results = []
    for is_on in (False, True):
        x = hidden(2, 5).requires_grad_()
        lm_head.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_on):
            logits = lm_head_logits(lm_head, x, precision="bf16x3").logits
            logits.square().sum().backward()
        results.append((logits.detach(), x.grad, lm_head.weight.grad.clone()))

    assert all(same(left, right) for left, right in zip(*results, strict=True))


@in_bf16
def test_a_wrapped_head_is_called_and_its_products_are_made_so(precision):
    wrapped, x = Wrapped(head(bias=True)), hidden(2, 5)
    seen = []
    wrapped.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    found = lm_head_logits(wrapped, x, precision=precision).logits
    plain = lm_head_logits(wrapped.inner, x, precision=precision).logits

    assert seen == [torch.float32]
    assert same(found, plain * 2)
    assert lm_head_logits(wrapped, x, precision=precision, logits_dtype="bf16").logits.dtype == (
        torch.bfloat16
    )


@in_bf16
def test_a_head_that_rounds_what_it_gives_is_given_back_in_float32(precision):
    class Rounded(Wrapped):
        def forward(self, x):
            return self.inner(x).bfloat16()

    lm_head, x = head(), hidden(2, 5)
    plain = lm_head_logits(lm_head, x, precision=precision).logits
    found = lm_head_logits(Rounded(lm_head), x, precision=precision).logits

    assert same(found, plain.bfloat16().float())


@in_bf16
def test_a_head_whose_product_cannot_be_made_so_is_an_error(precision):
    class Multiplied(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(head().weight.detach())

        def forward(self, x):
            return x @ self.weight.to(x.dtype).t()

    with pytest.raises(
        ConfigError, match=r"Multiplied, computes: it makes no product by torch\.nn"
    ):
        lm_head_logits(Multiplied(), hidden(2, 5), precision=precision)


@in_bf16
def test_a_wrapped_head_that_was_compiled_is_multiplied_so_as_well(precision):
    torch._dynamo.reset()
    wrapped, x = Wrapped(head(bias=True)), hidden(2, 5)
    compiled = torch.compile(wrapped, backend="aot_eager")
    for _ in range(2):
        found = lm_head_logits(compiled, x, precision=precision).logits
        assert same(found, lm_head_logits(wrapped, x, precision=precision).logits)


@in_bf16
@pytest.mark.parametrize("shape", [(2, 5), (5,)])
def test_logits_are_no_view_and_can_be_changed_in_place(precision, shape):
    logits = lm_head_logits(head(), hidden(*shape), precision=precision).logits
    assert logits._base is None
    logits.div_(2).sum().backward()


@in_bf16
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_hidden_states_of_another_dtype_are_an_error(precision, dtype):
    for lm_head in (head(), Wrapped(head())):
        with pytest.raises(ConfigError, match="takes bf16: cast them"):
            lm_head_logits(lm_head, hidden(2, 5).to(dtype), precision=precision)


@in_bf16
@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_a_weight_of_another_dtype_is_an_error(precision, dtype):
    lm_head = head()
    lm_head.weight = nn.Parameter(lm_head.weight.detach().to(dtype), requires_grad=False)
    with pytest.raises(ConfigError, match="needs weights of fp32, fp16 or bf16"):
        lm_head_logits(lm_head, hidden(2, 5), precision=precision)


def test_another_hidden_size_is_an_error():
    with pytest.raises(ConfigError, match="hidden sizes 8 and 16"):
        lm_head_logits(head(), hidden(2, 5)[..., :8], precision="bf16x3")


@pytest.mark.parametrize("precision", [None, "fp32"])
def test_parts_without_a_use_are_an_error(precision):
    lm_head = head()
    with pytest.raises(ConfigError, match="weight_parts=WeightParts with precision"):
        lm_head_logits(
            lm_head, hidden(2), precision=precision, weight_parts=weight_parts(lm_head.weight)
        )


@pytest.mark.parametrize("given", [torch.ones(V, 3 * H), "parts"])
def test_parts_that_are_none_are_an_error(given):
    with pytest.raises(ConfigError, match=r"what weight_parts\(lm_head.weight\) gives"):
        lm_head_logits(head(), hidden(2), precision="bf16x3", weight_parts=given)


def test_parts_of_another_weight_are_an_error():
    with pytest.raises(
        ConfigError, match=r"\(9, 48\) on cpu; for this weight it must be \(11, 48\)"
    ):
        lm_head_logits(
            head(), hidden(2), precision="bf16x3", weight_parts=weight_parts(torch.ones(9, H))
        )


def test_parts_on_another_device_are_an_error():
    stacked = torch.empty(V, 3 * H, device="meta", dtype=torch.bfloat16)
    parts = WeightParts(stacked, num_parts=3, is_exact=True)
    with pytest.raises(ConfigError, match=r"\(11, 48\) on meta; for this weight .* on cpu"):
        lm_head_logits(head(), hidden(2), precision="bf16x3", weight_parts=parts)


def test_parts_for_a_head_that_has_to_be_called_are_an_error():
    wrapped = Wrapped(head())
    with pytest.raises(
        ConfigError, match=r"plain nn.Linear without hooks, and lm_head is a Wrapped"
    ):
        lm_head_logits(
            wrapped,
            hidden(2),
            precision="bf16x3",
            weight_parts=weight_parts(wrapped.inner.weight),
        )


def test_the_path_says_why():
    x, weight = hidden(2), head().weight

    assert logits_path(x, weight, precision="fp32").reason == "precision='fp32'"
    assert logits_path(x, weight, precision="bf16").name == "bf16"
    on_cpu = LogitsPath("fp32", reason="hidden_states is on cpu")
    assert logits_path(x, weight_parts(weight), precision="bf16x3") == on_cpu


def test_there_is_no_second_derivative():
    lm_head, x = head(), hidden(2).requires_grad_()
    logits = lm_head_logits(lm_head, x, precision="bf16x3").logits
    (grad,) = torch.autograd.grad(logits.square().sum(), x, create_graph=True)
    with pytest.raises(ConfigError, match="no second derivative"):
        grad.sum().backward()


def test_meta_tensors_give_shapes_and_dtypes():
    lm_head = nn.Linear(H, V, device="meta")
    x = torch.empty(2, 5, H, device="meta", dtype=torch.bfloat16, requires_grad=True)
    found = lm_head_logits(lm_head, x, precision="bf16x3").logits
    found.sum().backward()

    assert (found.shape, found.dtype, found.device.type) == ((2, 5, V), torch.float32, "meta")
    assert lm_head.weight.grad.shape == (V, H)


@pytest.mark.parametrize("lm_head", [head(), Wrapped(head())], ids=["plain", "wrapped"])
@in_bf16
def test_compiled_it_is_one_opaque_operator_with_the_same_bits(graphs, lm_head, precision):
    def project(x):
        return lm_head_logits(lm_head, x, precision=precision, logits_to_keep=2).logits

    compiled = torch.compile(project, backend=graphs, fullgraph=True)
    found, expected = compiled(hidden(2, 5)), project(hidden(2, 5))

    assert same(found, expected)
    assert any(OPERATOR in target for target in graphs.targets[0])


@in_bf16
def test_compiled_gradients_are_those_of_eager_mode(precision):
    torch._dynamo.reset()
    lm_head = head(bias=True)

    def project(x):
        return lm_head_logits(lm_head, x, precision=precision).logits

    results = []
    for function in (project, torch.compile(project, backend="aot_eager", fullgraph=True)):
        x = hidden(2, 5).requires_grad_()
        lm_head.zero_grad()
        function(x).square().sum().backward()
        results.append((x.grad, lm_head.weight.grad.clone(), lm_head.bias.grad.clone()))

    assert all(same(left, right) for left, right in zip(*results, strict=True))


def test_many_lengths_need_two_graphs(graphs):
    lm_head = head()
    compiled = torch.compile(
        lambda x: lm_head_logits(lm_head, x, precision="bf16x3").logits,
        backend=graphs,
        fullgraph=True,
    )
    for length in range(2, 52):
        compiled(hidden(2, length))

    assert len(graphs.graphs) <= 2


@in_bf16
def test_an_exported_program_depends_on_torch_only(precision):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm_head = head(bias=True)

        def forward(self, x):
            return lm_head_logits(self.lm_head, x, precision=precision).logits

    model = Model()
    program = torch.export.export(model, (hidden(2, 5),))
    targets = {str(node.target) for node in program.graph.nodes}

    assert not any("automodel_fn" in target for target in targets)
    assert torch.equal(program.module()(hidden(2, 5)), model(hidden(2, 5)))


@in_bf16
def test_transforms_of_torch_func_get_what_autograd_gives(precision):
    lm_head, x = head(), hidden(2, 5)

    def total(x, weight):
        project = torch.func.functional_call
        logits = project(LMHead.from_linear(lm_head, precision=precision), {"weight": weight}, (x,))
        return logits.square().sum()

    found = torch.func.grad(total, argnums=(0, 1))(x, lm_head.weight.detach())
    leaves = x.clone().requires_grad_(), lm_head.weight.detach().clone().requires_grad_()
    total(*leaves).backward()

    loss = {"bf16x3": 2**-7, "bf16": 2**-6}[precision]
    for left, leaf in zip(found, leaves, strict=True):
        assert left.dtype == leaf.dtype
        torch.testing.assert_close(left, leaf.grad, rtol=loss, atol=loss)


def test_a_vmap_projects_each():
    lm_head, x = head(), hidden(3, 2, 5)
    found = torch.func.vmap(lambda x: lm_head_logits(lm_head, x, precision="bf16x3").logits)(x)

    torch.testing.assert_close(found, lm_head(x.float()))


@pytest.mark.parametrize("is_on_gpu", [False, True])
@in_bf16
def test_compiled_code_takes_parts_that_are_made_outside_of_it_after_every_step(
    graphs, monkeypatch, precision, is_on_gpu
):
    if is_on_gpu:
        monkeypatch.setattr(_logits_product, "_takes_parts", lambda hidden, parts: parts.is_exact)
    lm_head = head()
    optimizer = torch.optim.SGD(lm_head.parameters(), lr=0.1)

    def project(x, parts):
        return lm_head_logits(lm_head, x, precision=precision, weight_parts=parts).logits

    compiled = torch.compile(project, backend=graphs, fullgraph=True)
    seen = []
    for _ in range(4):
        x, parts = hidden(2, 5), weight_parts(lm_head.weight)
        found = compiled(x, parts)
        assert same(found, project(x, parts))
        seen.append(found.detach())
        found.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    assert len(graphs.graphs) == 1
    assert not any(same(seen[0], other) for other in seen[1:])


@pytest.mark.parametrize("precision", ["fp32", "bf16x3", "bf16"])
@pytest.mark.parametrize(
    "strided", [hidden(5, 2).transpose(0, 1), torch.cat([hidden(2, 5)] * 2, -1)[..., ::2]]
)
def test_strides_do_not_matter(precision, strided):
    lm_head = head(bias=True)
    lm_head.weight = nn.Parameter(lm_head.weight.detach().T.contiguous().T)
    assert not strided.is_contiguous()
    assert not lm_head.weight.is_contiguous()
    results = []
    for x, used in ((strided, lm_head), (strided.contiguous(), head(bias=True))):
        leaf = x.detach().requires_grad_()
        logits = lm_head_logits(used, leaf, precision=precision).logits
        logits.square().sum().backward()
        results.append((logits, leaf.grad, used.weight.grad))

    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(
            left, right, rtol=1e-5 if left.itemsize > 2 else 2**-7, atol=1e-5
        )


@pytest.mark.parametrize("precision", ["fp32", "bf16x3", "bf16"])
def test_fake_tensors_give_shapes_and_dtypes(precision):
    with FakeTensorMode():
        x = torch.empty(2, 5, H, dtype=torch.bfloat16, requires_grad=True)
        lm_head = nn.Linear(H, V)
        found = lm_head_logits(lm_head, x, precision=precision, logits_to_keep=2).logits
        found.sum().backward()

    assert (found.shape, found.dtype) == ((2, 2, V), torch.float32)
    assert (x.grad.shape, x.grad.dtype) == (x.shape, torch.bfloat16)
    assert lm_head.weight.grad.shape == (V, H)
