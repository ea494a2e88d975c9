import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as cohere
from transformers.models.glm.modeling_glm import apply_rotary_pos_emb as glm
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

from automodel_fn import ConfigError, apply_rope
from automodel_fn.ops import rope_kernel
from automodel_fn.ops._apply_rope import apply_rope_reference

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
B, S, N, K, D = 2, 7, 6, 2, 16

both_styles = pytest.mark.parametrize("interleaved", [False, True])


def bits(tensor):
    return tensor.detach().contiguous().view(INTEGERS[tensor.dtype.itemsize])


def same(left, right):
    return all(
        x.dtype == y.dtype and torch.equal(bits(x), bits(y))
        for x, y in zip(left, right, strict=True)
    )


def tables(num_positions, half, dtype=torch.float32):
    angles = torch.arange(num_positions)[:, None] / 100 ** (torch.arange(half) / half)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def twice(*found):
    return [torch.cat([table, table], -1)[None] for table in found]


@pytest.fixture
def heads():
    q, k = torch.randn(B, S, N, D), torch.randn(B, S, K, D)
    return q, k


def turned(*found):
    """As Hugging Face's attention makes them: heads first, in memory that has tokens first."""
    return [x.transpose(1, 2) for x in found]


def test_float32_has_the_bits_of_llama_forward_and_backward(heads):
    leaves = [x.requires_grad_() for x in turned(*heads)]
    cos, sin = tables(S, D // 2)
    expected = llama(*leaves, *twice(cos, sin))
    upstream = [torch.randn_like(x) for x in expected]
    gradients = torch.autograd.grad(expected, leaves, upstream)

    for given in ((cos, sin), twice(cos, sin)):
        found = apply_rope(*leaves, *given, layout="bhsd")

        assert same(found, expected)
        assert same(torch.autograd.grad(found, leaves, upstream), gradients)


@both_styles
@pytest.mark.parametrize("layout", ["bshd", "bhsd", "thd"])
@pytest.mark.parametrize("ids", [3, torch.arange(S).flip(0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_the_reference_rounded(heads, dtype, ids, layout, interleaved):
    q, k = (x.to(dtype) for x in (turned(*heads) if layout == "bhsd" else heads))
    q, k = (x[0] if layout == "thd" else x for x in (q, k))
    cos, sin = tables(S + 3, D // 4)
    options = {"position_ids": ids, "layout": layout, "interleaved": interleaved}
    exact = apply_rope_reference(q, k, cos, sin, **options)

    eps = torch.finfo(dtype).eps
    for found, reference in zip(apply_rope(q, k, cos, sin, **options), exact, strict=True):
        assert reference.dtype == torch.float64
        torch.testing.assert_close(found.double(), reference, rtol=0, atol=8 * eps)


@pytest.mark.parametrize("layout", ["bshd", "thd"])
def test_the_reference_takes_the_rows_of_the_tokens_themselves(heads, layout):
    q, k = (x[:1] for x in heads)
    q, k = (x[0] if layout == "thd" else x for x in (q, k))
    cos, sin = tables(S, D // 2)
    expected = apply_rope_reference(q, k, cos, sin)

    found = apply_rope_reference(q, k, *twice(cos, sin))
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


def test_interleaved_and_partial_has_the_bits_of_glm(heads):
    q, k = turned(*heads)
    cos, sin = tables(S, D // 4)

    assert same(
        apply_rope(q, k, cos, sin, layout="bhsd", interleaved=True), glm(q, k, *twice(cos, sin))
    )


def test_tables_that_repeat_each_angle_at_once_are_given_by_a_view(heads):
    q, k = turned(*heads)
    cos, sin = (table.repeat_interleave(2, -1)[None] for table in tables(S, D // 2))
    found = apply_rope(
        q, k, cos[..., ::2], sin[..., ::2], layout="bhsd", rotary_dim=D, interleaved=True
    )

    assert same(found, cohere(q, k, cos, sin))


@both_styles
@pytest.mark.parametrize("rotary_dim", [2, 6, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_are_computed_in_float32_and_rounded_once(
    heads, dtype, rotary_dim, interleaved
):
    cos, sin = tables(S, rotary_dim // 2)
    q, k = (x.to(dtype) for x in heads)
    wide = apply_rope(q.float(), k.float(), cos, sin, interleaved=interleaved)
    found = apply_rope(q, k, cos, sin, interleaved=interleaved)

    assert same(found, [x.to(dtype) for x in wide])
    assert same([x[..., rotary_dim:] for x in found], [q[..., rotary_dim:], k[..., rotary_dim:]])


@both_styles
def test_the_layouts_agree(heads, interleaved):
    q, k = heads
    cos, sin = tables(S + 3, D // 4)
    ids = torch.randint(0, S + 3, (B, S))
    options = {"interleaved": interleaved}
    expected = apply_rope(q, k, cos, sin, position_ids=ids, **options)
    first = apply_rope(*turned(q, k), cos, sin, position_ids=ids, layout="bhsd", **options)
    packed = [x.flatten(0, 1) for x in heads]
    packed = apply_rope(*packed, cos, sin, position_ids=ids.flatten(), **options)

    assert same(turned(*first), expected)
    assert same([x.unflatten(0, (B, S)) for x in packed], expected)


def test_position_ids_offsets_and_rows_by_token_say_the_same(heads):
    cos, sin = tables(30, D // 2)
    ids = torch.arange(5, 5 + S)
    expected = apply_rope(*heads, cos[5 : 5 + S], sin[5 : 5 + S])
    ways = [
        {"position_ids": 5},
        {"position_ids": ids},
        {"position_ids": ids[None]},
        {"position_ids": ids.int().expand(B, S)},
    ]
    for way in ways:
        assert same(apply_rope(*heads, cos, sin, **way), expected)
    assert same(apply_rope(*heads, *(x[:, ids] for x in twice(cos, sin))), expected)


def test_each_example_and_each_packed_sequence_has_its_own_positions(heads):
    cos, sin = tables(30, D // 2)
    ids = torch.stack([torch.arange(S), torch.arange(20, 20 + S)])
    found = apply_rope(*heads, cos, sin, position_ids=ids)
    by_token = apply_rope(*heads, *(table[ids].repeat(1, 1, 2) for table in (cos, sin)))
    single = [
        apply_rope(*(x[i : i + 1] for x in heads), cos, sin, position_ids=start)
        for i, start in enumerate((0, 20))
    ]

    assert same(found, by_token)
    assert same(found, [torch.cat(pair) for pair in zip(*single, strict=True)])


def test_rows_by_token_of_a_packed_sequence_may_have_their_leading_one(heads):
    packed = [x.flatten(0, 1) for x in heads]
    cos, sin = tables(B * S, D // 2)

    assert same(apply_rope(*packed, *twice(cos, sin)), apply_rope(*packed, cos, sin))


def test_tables_with_each_angle_twice_are_taken_where_rotary_dim_says_so(heads):
    cos, sin = tables(S, D // 4)
    doubled = [table[0] for table in twice(cos, sin)]

    assert same(apply_rope(*heads, *doubled, rotary_dim=D // 2), apply_rope(*heads, cos, sin))


@both_styles
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_first_and_second_derivatives_are_right(heads, layout, interleaved):
    cos, sin = (table.double() for table in tables(3, 2))
    shape = (2, 3, 3, 6)
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(2)]

    def rope(q, k):
        return apply_rope(q, k, cos, sin, layout=layout, interleaved=interleaved)

    assert gradcheck(rope, leaves)
    assert gradgradcheck(rope, leaves)


@pytest.mark.parametrize("wanted", [0, 1])
def test_one_of_both_may_be_differentiated_alone(heads, wanted):
    cos, sin = tables(S, D // 2)
    both = [x.clone().requires_grad_() for x in heads]
    expected = torch.autograd.grad(apply_rope(*both, cos, sin), both, heads)[wanted]
    given = [x.clone() for x in heads]
    given[wanted].requires_grad_()
    found = apply_rope(*given, cos, sin)[wanted]

    assert same(torch.autograd.grad(found, given[wanted], heads[wanted]), [expected])


@both_styles
def test_the_operator_that_is_compiled_fulfils_what_torch_asks_of_one(heads, interleaved):
    operator = torch.ops.automodel_fn.apply_rope.default
    cos, sin = tables(S + 2, 4)
    ids = torch.randint(0, S, (B, S))
    sliced = torch.randn(B, S, 2 * K, 2 * D)[:, :, ::2, :D].requires_grad_()
    for layout, pair in (("bshd", (heads[0], sliced)), ("bhsd", turned(*heads))):
        leaves = [x.detach().requires_grad_() for x in pair]
        for positions in (None, ids):
            arguments = (*leaves, cos, sin, positions, 8, layout, 2, interleaved, False)
            torch.library.opcheck(operator, arguments)


def test_the_layout_of_memory_does_not_matter(heads):
    cos, sin = tables(S, D // 2)
    expected = apply_rope(*heads, cos, sin)
    sliced = [torch.stack([x, -x], -1).flatten(-2)[..., ::2] for x in heads]
    fused = torch.cat(heads, 2).split([N, K], 2)
    for others in (sliced, fused, [x.transpose(0, 1).contiguous().transpose(0, 1) for x in heads]):
        assert not others[0].is_contiguous()
        assert same(apply_rope(*others, cos, sin), expected)
    flipped = [table.T.contiguous().T for table in (cos, sin)]
    assert same(apply_rope(*heads, *flipped), expected)


def test_what_is_given_stays_as_it_was(heads):
    given = [*heads, *tables(S, D // 2)]
    before = [x.clone() for x in given]
    apply_rope(*given)

    assert same(given, before)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 4)])
def test_empty_inputs_give_empty_outputs(shape):
    num_heads = 0 if shape == (2, 4) else 2
    q, k = torch.ones(*shape, num_heads, 4), torch.ones(*shape, 1, 4)
    leaves = [q.requires_grad_(), k.requires_grad_()]
    found = apply_rope(*leaves, *tables(4, 2))

    assert [x.shape for x in found] == [q.shape, k.shape]
    sum(x.sum() for x in found).backward()
    assert q.grad.shape == q.shape


def test_meta_and_fake_tensors_give_shapes_and_dtypes():
    def rope(device):
        q, k = (torch.empty(B, S, n, D, dtype=torch.bfloat16, device=device) for n in (N, K))
        cos, sin = (torch.empty(9, D // 2, device=device) for _ in range(2))
        ids = torch.empty(B, S, dtype=torch.int64, device=device)
        return apply_rope(q, k, cos, sin, position_ids=ids)

    expected = [((B, S, n, D), torch.bfloat16) for n in (N, K)]
    assert [(x.shape, x.dtype) for x in rope("meta")] == expected
    with FakeTensorMode():
        for device in ("cpu", "cuda"):
            assert [(x.shape, x.dtype) for x in rope(device)] == expected


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_it_can_be_mapped_and_differentiated_by_torch_func(heads):
    cos, sin = tables(S, D // 2)
    expected = apply_rope(*heads, cos, sin)
    found = torch.func.vmap(lambda q, k: apply_rope(q, k, cos, sin))(*heads)

    assert same(found, expected)
    value, slope = torch.func.jvp(
        lambda q: apply_rope(q, heads[1], cos, sin)[0], heads[:1], heads[:1]
    )
    assert same([value, slope], [expected[0], expected[0]])


def test_whoever_looks_at_operators_sees_one_forward_and_one_backward(heads):
    seen = []

    class Looking(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    leaves = [x.requires_grad_() for x in heads]
    unseen = apply_rope(*leaves, *tables(S, D // 2))
    with Looking():
        found = apply_rope(*leaves, *tables(S, D // 2))
        assert seen.count("automodel_fn.apply_rope.default") == 1
        gradients = [torch.autograd.grad(both, leaves, heads) for both in (found, unseen)]
    assert seen.count("automodel_fn.apply_rope.default") == 3
    assert same(found, unseen)
    assert same(*gradients)


def test_the_choice_of_the_kernel_says_why(heads):
    assert rope_kernel(*heads).name == "torch"
    assert rope_kernel(*heads).reason == "q is on cpu"
    with FakeTensorMode():
        fake = torch.empty(1, 1, 2, device="cuda")
        assert rope_kernel(fake.double(), fake.double()).reason == "q is torch.float64"
        assert "q is torch.int8" in rope_kernel(fake.to(torch.int8), fake).reason


@pytest.mark.parametrize("value", [-1, S + 3])
def test_a_position_that_the_tables_do_not_have_is_an_error(heads, value):
    ids = torch.zeros(B, S, dtype=torch.int64)
    ids[1, 3] = value
    with pytest.raises(ConfigError, match=r"positions are .* the tables have 0 to 9"):
        apply_rope(*heads, *tables(S + 3, 4), position_ids=ids)
    with pytest.raises(ConfigError, match=r"the tables have 0 to 9"):
        apply_rope(*heads, *tables(S + 3, 4), position_ids=value)


def test_where_positions_are_not_looked_at_a_negative_one_is_refused_all_the_same(heads):
    ids = torch.full((B, S), -1)
    with pytest.raises(IndexError, match="out of range"):
        torch.ops.automodel_fn.apply_rope(*heads, *tables(9, 8), ids, D, "bshd", 0, False, False)


WRONG = {
    "layout='sbhd' must be one of 'bshd', 'bhsd', 'thd'": {"layout": "sbhd"},
    "asks for 3 dimensions": {"layout": "thd"},
    "only the heads": {"k": torch.ones(B, S + 1, K, D)},
    "one floating point dtype": {"k": torch.ones(B, S, K, D).half()},
    "they must be on one device": {"k": torch.ones(B, S, K, D, device="meta")},
    "must be even, and from 2 to the 16 of a head": {"rotary_dim": 18},
    "cos is 8 wide; rotary_dim=6 asks for 3 or 6": {"rotary_dim": 6},
    "rotary_dim=0 must be even": {"rotary_dim": 0},
    "sin has": {"sin": torch.ones(9, 4)},
    "the tokens of q ask for": {"cos": torch.ones(3, S, 8), "sin": torch.ones(3, S, 8)},
    "cos has 1 dimensions": {"cos": torch.ones(8), "sin": torch.ones(8), "rotary_dim": 8},
    "it must be floating point": {"sin": torch.ones(9, 8).int()},
    "requires a gradient, which is not computed": {"sin": torch.ones(9, 8, requires_grad=True)},
    "position_ids=1.5 must be": {"position_ids": 1.5},
    "position_ids=True must be": {"position_ids": True},
    "the positions are 3 to 9; the tables have 0 to 8": {"position_ids": 3},
    "position_ids have the shape (3, 7)": {"position_ids": torch.zeros(3, S).long()},
    "position_ids have the shape ()": {"position_ids": torch.zeros(()).long()},
    "position_ids are torch.float32": {"position_ids": torch.zeros(S)},
    "give no position_ids": {
        "cos": torch.ones(1, S, D),
        "sin": torch.ones(1, S, D),
        "position_ids": 1,
    },
    "ask for tables [P, R / 2]": {
        "cos": torch.ones(1, S, D),
        "sin": torch.ones(1, S, D),
        "position_ids": torch.zeros(S).long(),
    },
}


@pytest.mark.parametrize("message", WRONG)
def test_what_does_not_fit_is_an_error_that_says_so(heads, message):
    given = dict(zip("qk", heads, strict=True)) | {"cos": torch.ones(9, 8), "sin": torch.ones(9, 8)}
    with pytest.raises(ConfigError) as caught:
        apply_rope(**given | WRONG[message])
    assert message in str(caught.value)


def test_all_that_is_wrong_is_said_at_once(heads):
    with pytest.raises(ConfigError) as caught:
        apply_rope(*heads, torch.ones(9, 8).int(), torch.ones(8, 8), position_ids=-1)
    text = str(caught.value)
    assert all(part in text for part in ("torch.int32", "sin has", "the positions are -1"))


def test_narrow_tables_are_taken_as_they_are(heads):
    cos, sin = tables(S, D // 2, torch.bfloat16)

    assert same(apply_rope(*heads, cos, sin), apply_rope(*heads, cos.float(), sin.float()))
