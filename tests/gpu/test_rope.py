import itertools

import pytest
import torch

from automodel_fn import RopeConfig, apply_rope, rope_tables
from automodel_fn.ops import rope_kernel
from automodel_fn.testing import check_rope

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
    # Inductor imports parts of torch that warn.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:torch.*"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning"),
]

B, S, N, K, P = 2, 37, 12, 2, 64
SHAPES = {"bshd": "bshd", "bhsd": "bhsd", "thd": "shd"}
SIZES = ((128, 128), (128, 32), (80, 32), (96, 96), (7, 6))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def bits(tensor):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(integers[tensor.dtype.itemsize])


def same(left, right):
    return all(
        x.dtype == y.dtype and torch.equal(bits(x).cpu(), bits(y).cpu())
        for x, y in zip(left, right, strict=True)
    )


def made(layout, head_dim, dtype, device="cpu"):
    sizes = {"b": B, "s": S, "d": head_dim}
    shapes = [[{**sizes, "h": heads}[of] for of in SHAPES[layout]] for heads in (N, K)]
    q, k = (torch.randn(shape).to(dtype).to(device) for shape in shapes)
    # Of one the memory has another order, as after Hugging Face's projections.
    return q.transpose(-2, -3).contiguous().transpose(-2, -3), k


def position_ids(layout, kind):
    if kind == "offset":
        return 5
    shape = (S,) if kind == "tokens" else (1 if layout == "thd" else B, S)
    return torch.randint(0, P, shape, dtype=torch.int64 if kind == "tokens" else torch.int32)


def on_gpu(*values):
    return [x.cuda() if isinstance(x, torch.Tensor) else x for x in values]


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", SHAPES)
def test_the_kernel_has_the_bits_of_the_cpu_forward_and_backward(layout, dtype, interleaved):
    kinds = itertools.cycle(("offset", "tokens", "examples"))
    for (head_dim, rotary_dim), kind in zip(SIZES, kinds, strict=False):
        tables = rope_tables(RopeConfig(1e4), rotary_dim, P, device="cpu")
        q, k = made(layout, head_dim, dtype)
        ids = position_ids(layout, kind)
        found = []
        for given in (
            (q, k, tables.cos, tables.sin, ids),
            on_gpu(q, k, tables.cos, tables.sin, ids),
        ):
            *pair, cos, sin, at = given
            leaves = [x.detach().requires_grad_() for x in pair]
            turned = apply_rope(
                *leaves, cos, sin, position_ids=at, layout=layout, interleaved=interleaved
            )
            # Twice: what was compiled is launched in another way than what is new.
            once_more = apply_rope(
                *pair, cos, sin, position_ids=at, layout=layout, interleaved=interleaved
            )
            assert same(turned, once_more)
            gradients = torch.autograd.grad(turned, leaves, pair)
            # Gradients are added to zeros where torch slices: that has no -0.0.
            found.append([*turned, *(x + 0.0 for x in gradients)])

        assert rope_kernel(*on_gpu(q, k)).name == "triton"
        assert same(*found), (head_dim, rotary_dim, kind)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_law_of_rotations_holds(dtype):
    tables = rope_tables(RopeConfig(1e4), 32, P, device="cuda")
    for layout in SHAPES:
        q, k = made(layout, 64, dtype, "cuda")
        check_rope(q, k, tables.cos, tables.sin, layout=layout)


def test_the_order_of_memory_is_kept_and_nothing_else_is():
    q, k = (torch.randn(B, S, h, 64, device="cuda").transpose(1, 2) for h in (N, K))
    tables = rope_tables(RopeConfig(1e4), 64, P, device="cuda")
    found = apply_rope(q, k, tables.cos, tables.sin, layout="bhsd")
    sliced = torch.cat([q, k], 1).split([N, K], 1)

    assert [x.stride() for x in found] == [q.stride(), k.stride()]
    assert same(apply_rope(*sliced, tables.cos, tables.sin, layout="bhsd"), found)


def test_a_position_outside_of_the_tables_is_nan():
    q, k = made("bshd", 64, torch.float32, "cuda")
    tables = rope_tables(RopeConfig(1e4), 64, P, device="cuda")
    ids = torch.arange(S, device="cuda")
    ids[3], ids[4] = -1, P
    found = apply_rope(q, k, tables.cos, tables.sin, position_ids=ids)

    for x in found:
        assert x[:, 3:5].isnan().all()
        assert x.isnan().sum() == x[:, 3:5].numel()


def test_second_derivatives_are_those_of_the_cpu():
    q, k = made("bshd", 8, torch.float32)
    tables = rope_tables(RopeConfig(1e4), 8, P, device="cpu")
    weights = torch.randn_like(q)
    found = []
    for given in (
        (q, k, tables.cos, tables.sin, weights),
        on_gpu(q, k, tables.cos, tables.sin, weights),
    ):
        q_, k_, cos, sin, w = given
        leaf = q_.detach().requires_grad_()
        turned, _ = apply_rope(leaf, k_, cos, sin)
        (slope,) = torch.autograd.grad((turned**3 * w).sum(), leaf, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), leaf)[0].cpu())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_it_has_the_same_bits(dtype):
    torch._dynamo.reset()
    tables = rope_tables(RopeConfig(1e4), 64, P, device="cuda")
    compiled = torch.compile(apply_rope, fullgraph=True)
    leaves = [x.requires_grad_() for x in made("bhsd", 64, dtype, "cuda")]
    results = []
    for rope in (apply_rope, compiled):
        turned = rope(*leaves, tables.cos, tables.sin, layout="bhsd")
        results.append(
            [*turned, *torch.autograd.grad(turned, leaves, [x.detach() for x in turned])]
        )
    assert same(*results)


def test_empty_inputs_give_empty_outputs():
    cos = torch.ones(4, 2, device="cuda")
    for shape in ((0, 4, 2, 4), (2, 0, 2, 4), (2, 4, 0, 4)):
        q, k = torch.ones(shape, device="cuda"), torch.ones(*shape[:2], 1, 4, device="cuda")
        assert [x.shape for x in apply_rope(q, k, cos, cos)] == [q.shape, k.shape]


def test_float64_is_computed_by_torch_in_float64():
    q, k = made("bshd", 64, torch.float64)
    tables = rope_tables(RopeConfig(1e4), 64, P, device="cpu")
    found = apply_rope(*on_gpu(q, k, tables.cos, tables.sin))

    assert rope_kernel(*on_gpu(q, k)).reason == "q is torch.float64"
    assert same(found, apply_rope(q, k, tables.cos, tables.sin))


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_are_turned_without_keys(dtype):
    q, _ = made("bshd", 128, dtype, "cuda")
    q = q.requires_grad_()
    nothing = q.detach().narrow(2, 0, 0)
    tables = rope_tables(RopeConfig(1e4), 128, P, device="cuda")
    found, empty = apply_rope(q, nothing, tables.cos, tables.sin)
    expected, _ = apply_rope(q, q.detach(), tables.cos, tables.sin)

    assert empty.shape == nothing.shape
    assert same([found], [expected])
    weights = torch.randn_like(found)
    (ours,), (theirs,) = (torch.autograd.grad(each, q, weights) for each in (found, expected))
    assert same([ours], [theirs])
