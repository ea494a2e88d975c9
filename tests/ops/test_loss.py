import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils import _pytree
from torch.utils.checkpoint import checkpoint

from automodel_fn import ConfigError, LMHeadLoss, lm_head_loss, lm_head_loss_kernel
from automodel_fn.ops._loss import lm_head_loss_reference

H, V = 16, 37
# Relative to the norm: what the roundings of the dtype leave.
TOLERANCE = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 5e-4,
    torch.bfloat16: 4e-3,
}
by_dtype = pytest.mark.parametrize("dtype", TOLERANCE)
OPTIONS = {
    "plain": {},
    "shift": {"shift": True},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "none, shifted, smoothed": {"reduction": "none", "shift": True, "label_smoothing": 0.3},
    "smoothing": {"label_smoothing": 0.1},
    "all smooth": {"label_smoothing": 1.0},
    "z-loss": {"z_loss": 1e-2},
    "soft cap": {"softcap": 2.0},
    "items": {"num_items_in_batch": 1000},
    "all": {"shift": True, "label_smoothing": 0.1, "z_loss": 1e-2, "softcap": 3.0},
    "label 0 ignored": {"ignore_index": 0},
}


def made(dtype=torch.float32, shape=(3, 11), bias=False, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(*shape, H, generator=generator).to(dtype)
    weight = torch.randn(V, H, generator=generator).to(dtype)
    labels = torch.randint(0, V, shape, generator=generator)
    labels.view(-1)[4:7] = -100
    labels.view(-1)[7] = 0
    offsets = torch.randn(V, generator=generator).to(dtype) if bias else None
    return hidden, weight, labels, offsets


def leaves(*tensors):
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def demand_close(found, expected, dtype):
    error = (found.double() - expected).norm()
    assert error <= TOLERANCE[dtype] * expected.norm(), (error / expected.norm()).item()


def compare(dtype, options, *, bias=False, chunk_size=None, shape=(3, 11)):
    hidden, weight, labels, offsets = made(dtype, shape, bias)
    if options.get("ignore_index") == 0:
        labels[labels == -100] = 0
    wide = leaves(*(None if t is None else t.double() for t in (hidden, weight, offsets)))
    expected = lm_head_loss_reference(*wide[:2], labels, bias=wide[2], **options)
    upstream = torch.rand(expected.shape, dtype=torch.float64) + 0.5
    expected.backward(upstream)
    own = leaves(hidden, weight, offsets)
    found = lm_head_loss(*own[:2], labels, bias=own[2], chunk_size=chunk_size, **options)
    assert found.loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert found.loss.shape == expected.shape
    found.loss.backward(upstream.to(found.loss.dtype))
    demand_close(found.loss.detach(), expected.detach(), dtype)
    for ours, theirs in zip(own, wide, strict=True):
        if ours is not None:
            assert ours.grad.dtype == dtype
            demand_close(ours.grad, theirs.grad, dtype)
    return found


@by_dtype
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_loss_and_gradients_are_those_of_all_logits_in_float64(dtype, options):
    compare(dtype, options, bias="softcap" in options)


@by_dtype
@pytest.mark.parametrize("chunk_size", [1, 2, 7, 32, 33, 34, 1000])
def test_any_chunk_size_gives_the_same(dtype, chunk_size):
    compare(dtype, {"label_smoothing": 0.1}, bias=True, chunk_size=chunk_size)


@by_dtype
def test_without_options_it_is_cross_entropy(dtype):
    hidden, weight, labels, _ = made(dtype)
    logits = functional.linear(hidden.double(), weight.double())
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    demand_close(lm_head_loss(hidden, weight, labels).loss, expected, dtype)


def test_shifting_is_what_transformers_does():
    from transformers.loss.loss_utils import ForCausalLMLoss

    hidden, weight, labels, _ = made()
    logits = functional.linear(hidden, weight)
    for items in (None, 7, torch.tensor(7)):
        expected = ForCausalLMLoss(logits, labels, V, num_items_in_batch=items)
        found = lm_head_loss(hidden, weight, labels, shift=True, num_items_in_batch=items)
        torch.testing.assert_close(found.loss, expected)


def test_microbatches_add_up_to_the_mean_over_all():
    hidden, weight, labels, _ = made(shape=(4, 9))
    whole, parts = leaves(weight, weight)
    lm_head_loss(hidden, whole, labels).loss.backward()
    items = (labels != -100).sum()
    for row in range(4):
        lm_head_loss(hidden[row], parts, labels[row], num_items_in_batch=items).loss.backward()

    torch.testing.assert_close(parts.grad, whole.grad)


def test_what_the_loss_is_made_of_is_returned():
    found = compare(torch.float64, {"z_loss": 0.5})
    hidden, weight, labels, _ = made(torch.float64)
    without = lm_head_loss(hidden, weight, labels).loss

    torch.testing.assert_close(found.loss.detach() - found.z_loss, without)
    assert not found.z_loss.requires_grad
    assert found.num_tokens == 30
    assert lm_head_loss(hidden, weight, labels, shift=True).num_tokens == 27


def test_the_result_is_a_pytree():
    hidden, weight, labels, _ = made()
    found = lm_head_loss(hidden, weight, labels)
    parts, shape = _pytree.tree_flatten(found)
    again = _pytree.tree_unflatten(parts, shape)

    assert isinstance(again, LMHeadLoss)
    for name in ("loss", "z_loss", "num_tokens"):
        assert getattr(again, name) is getattr(found, name)


@pytest.mark.parametrize("needed", [(True, False), (False, True), (False, False)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_gradients_that_are_needed_are_given(needed, reduction):
    hidden, weight, labels, _ = made()
    hidden.requires_grad_(needed[0])
    weight.requires_grad_(needed[1])
    loss = lm_head_loss(hidden, weight, labels, reduction=reduction).loss

    assert loss.requires_grad == any(needed)
    if any(needed):
        loss.sum().backward()
    assert (hidden.grad is not None, weight.grad is not None) == needed


def test_without_gradients_the_loss_is_the_same_and_needs_none():
    own = leaves(*made()[:2])
    labels = made()[2]
    with torch.no_grad():
        without = lm_head_loss(*own, labels).loss

    assert not without.requires_grad
    assert torch.equal(without, lm_head_loss(*own, labels).loss.detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_graph_that_is_kept_gives_its_gradients_again(reduction):
    own, labels = leaves(*made(torch.bfloat16)[:2]), made()[2]
    loss = lm_head_loss(*own, labels, reduction=reduction, chunk_size=8).loss.sum()
    first = torch.autograd.grad(3 * loss, own, retain_graph=True)
    second = torch.autograd.grad(3 * loss, own)

    for left, right in zip(first, second, strict=True):
        torch.testing.assert_close(left, right)


def test_the_gradient_that_is_kept_is_the_one_that_was_computed():
    own, labels = leaves(*made()[:2]), made()[2]
    loss = lm_head_loss(*own, labels).loss
    computed = loss.grad_fn.gradients
    addresses = [gradient.data_ptr() for gradient in computed[:2]]
    del computed
    loss.backward()

    assert [leaf.grad.data_ptr() for leaf in own] == addresses
    assert loss.grad_fn.gradients is None


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_an_error(reduction):
    own, labels = leaves(*made()[:2]), made()[2]
    loss = lm_head_loss(*own, labels, reduction=reduction).loss.sum()
    grads = torch.autograd.grad(loss, own, create_graph=True)

    for grad in grads:
        with pytest.raises(ConfigError, match="lm_head_loss has no second derivative"):
            grad.sum().backward(retain_graph=True)


def test_inside_of_a_checkpoint_it_gives_the_same():
    labels = made()[2]
    plain, recomputed = leaves(*made()[:2]), leaves(*made()[:2])
    lm_head_loss(*plain, labels).loss.backward()
    checkpoint(
        lambda *own: lm_head_loss(*own, labels).loss, *recomputed, use_reentrant=False
    ).backward()

    for left, right in zip(plain, recomputed, strict=True):
        assert torch.equal(left.grad, right.grad)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_where_all_is_ignored_it_does_what_cross_entropy_does(reduction):
    hidden, weight, labels, _ = made()
    labels.fill_(-100)
    own, theirs = leaves(hidden, weight), leaves(hidden, weight)
    logits = functional.linear(*theirs)
    expected = functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction=reduction)
    found = lm_head_loss(*own, labels, reduction=reduction).loss
    found.sum().backward()

    assert torch.equal(found.flatten(), expected.flatten()) or found.isnan() == expected.isnan()
    assert [bool(leaf.grad.any()) for leaf in own] == [False, False]


@pytest.mark.parametrize("shape", [(0,), (0, 5), (3, 0)])
def test_no_tokens_give_a_sum_of_zero_and_gradients_of_zero(shape):
    own = leaves(torch.empty(*shape, H), torch.randn(V, H))
    found = lm_head_loss(*own, torch.empty(shape, dtype=torch.int64), reduction="sum", shift=True)
    found.loss.backward()

    assert found.loss == 0
    assert not own[1].grad.any()
    assert own[0].grad.shape == own[0].shape


def test_strides_do_not_matter():
    hidden, weight, labels, _ = made()
    expected = lm_head_loss(hidden, weight, labels).loss
    own = (
        hidden.transpose(0, 1).contiguous().transpose(0, 1),
        weight.t().contiguous().t(),
        labels.t().contiguous().t(),
    )
    sliced = torch.randn(3, 11, 2 * H)[..., ::2].copy_(hidden)

    torch.testing.assert_close(lm_head_loss(*own).loss, expected)
    torch.testing.assert_close(lm_head_loss(sliced, weight, labels).loss, expected)


def test_labels_may_be_int32():
    hidden, weight, labels, _ = made()
    expected = lm_head_loss(hidden, weight, labels).loss

    assert torch.equal(lm_head_loss(hidden, weight, labels.int()).loss, expected)


def test_the_weight_is_multiplied_in_its_own_dtype_or_in_the_one_asked_for():
    hidden, weight, labels, _ = made()
    narrow = lm_head_loss(hidden.bfloat16(), weight.bfloat16(), labels).loss
    wide = lm_head_loss(hidden, weight, labels).loss

    assert torch.equal(lm_head_loss(hidden, weight, labels, precision="bf16").loss, narrow)
    assert torch.equal(lm_head_loss(hidden, weight.bfloat16(), labels).loss, narrow)
    assert not torch.equal(narrow, wide)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(lm_head_loss(hidden, weight, labels).loss, narrow)
        assert torch.equal(lm_head_loss(hidden, weight, labels, precision="fp32").loss, wide)


def test_autocast_leaves_float64_as_it_is():
    hidden, weight, labels, _ = made(torch.float64)
    expected = lm_head_loss(hidden, weight, labels).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lm_head_loss(hidden, weight, labels).loss

    assert found.dtype == torch.float64
    assert torch.equal(found, expected)


def test_exact_products_of_bf16_hidden_states_are_made_in_fp32_on_a_cpu():
    hidden, weight, labels, _ = made()
    own, wide = leaves(hidden.bfloat16(), weight), leaves(hidden.bfloat16().float(), weight)
    lm_head_loss(*own, labels, precision="bf16x3").loss.backward()
    lm_head_loss(*wide, labels, precision="fp32").loss.backward()

    assert torch.equal(own[0].grad, wide[0].grad.bfloat16())
    assert torch.equal(own[1].grad, wide[1].grad)


def test_mixed_dtypes_give_gradients_in_their_own():
    hidden, weight, labels, _ = made()
    own = leaves(hidden.bfloat16(), weight)
    lm_head_loss(*own, labels, precision="bf16").loss.backward()

    assert [leaf.grad.dtype for leaf in own] == [torch.bfloat16, torch.float32]


@pytest.mark.parametrize("wide", [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("chunk_size", [None, 7])
def test_float64_that_is_multiplied_in_bf16_gets_the_gradients_of_float32(
    chunk_size, reduction, wide
):
    labels = made()[2]
    own = leaves(
        *(t.double() if is_wide else t for t, is_wide in zip(made()[:2], wide, strict=True))
    )
    narrow = leaves(*made()[:2])
    for tensors in (own, narrow):
        options = {"precision": "bf16", "reduction": reduction, "chunk_size": chunk_size}
        lm_head_loss(*tensors, labels, **options).loss.sum().backward()

    for ours, theirs, is_wide in zip(own, narrow, wide, strict=True):
        assert ours.grad.dtype == (torch.float64 if is_wide else torch.float32)
        assert torch.equal(ours.grad.float(), theirs.grad)


def test_many_chunks_lose_no_bits_of_a_bf16_gradient():
    torch.manual_seed(0)
    hidden = torch.ones(4096, H, dtype=torch.bfloat16)
    weight = torch.zeros(V, H, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(4096, dtype=torch.int64)
    # Each of 4096 terms is 1 / V: bfloat16 would stop at a sum of 2**8 of them.
    lm_head_loss(hidden, weight, labels, reduction="sum", chunk_size=1).loss.backward()

    expected = torch.full((V, H), 4096 / V)
    expected[0] -= 4096
    assert torch.equal(weight.grad, expected.bfloat16())


def test_gradients_below_the_range_of_float16_wait_for_the_scale_of_the_loss():
    hidden, weight, labels, _ = made(torch.float16)
    own, wide = leaves(hidden, weight), leaves(hidden.double(), weight.double())
    options = {"num_items_in_batch": 2**30}
    (lm_head_loss(*own, labels, **options).loss * 2.0**30).backward()
    (lm_head_loss_reference(*wide, labels, **options) * 2.0**30).backward()

    for ours, theirs in zip(own, wide, strict=True):
        demand_close(ours.grad, theirs.grad, torch.float16)


def test_it_learns():
    torch.manual_seed(0)
    head = nn.Linear(H, V)
    hidden, labels = torch.randn(8, H), torch.arange(8)
    optimizer = torch.optim.Adam(head.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = lm_head_loss(hidden, head.weight, labels, bias=head.bias).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    assert losses[-1] < 0.05 < 3 < losses[0]


def test_on_the_meta_device_shapes_and_dtypes_are_those_of_the_real_one():
    own = leaves(*(tensor.to("meta") for tensor in made(torch.bfloat16)[:2]))
    labels = made()[2].to("meta")
    for reduction, shape in (("mean", ()), ("none", (3, 11))):
        loss = lm_head_loss(*own, labels, reduction=reduction).loss
        loss.sum().backward()

        assert (loss.shape, loss.dtype) == (shape, torch.float32)
        assert [(leaf.grad.shape, leaf.grad.dtype) for leaf in own] == [
            (leaf.shape, torch.bfloat16) for leaf in own
        ]


def test_the_kernel_and_the_reason_for_it_are_data():
    hidden, weight, _, _ = made()
    choice = lm_head_loss_kernel(hidden, weight)

    assert (choice.name, choice.reason) == ("torch", "hidden_states is on cpu")


@pytest.mark.parametrize("label", [-1, V, -101, 10**6])
def test_a_label_outside_of_the_vocabulary_is_named(label):
    hidden, weight, labels, _ = made()
    labels[1, 1] = label
    with pytest.raises(ConfigError, match=rf"labels has \[{label}\], outside of 0 to {V - 1}"):
        lm_head_loss(hidden, weight, labels)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"reduction": "avg"}, "reduction='avg' must be 'mean', 'sum' or 'none'"),
        ({"precision": "tf32"}, "precision='tf32' must be"),
        ({"precision": "bf16x3"}, "hidden_states has the dtype float32; precision='bf16x3'"),
        ({"precision": "bf16x3", "weight": torch.zeros(V, H).double()}, "splits bf16, fp16 or"),
        ({"label_smoothing": 1.5}, "label_smoothing=1.5 must be a number from 0 to 1"),
        ({"label_smoothing": True}, "label_smoothing=True"),
        ({"z_loss": -1.0}, "z_loss=-1.0 must be a finite number of at least 0"),
        ({"z_loss": float("nan")}, "z_loss=nan"),
        ({"softcap": 0}, "softcap=0 must be None or a finite number above 0"),
        ({"ignore_index": None}, "ignore_index=None must be an int"),
        ({"chunk_size": 0}, "chunk_size=0 must be None or an int of at least 1"),
        ({"num_items_in_batch": 3, "reduction": "sum"}, "num_items_in_batch divides a mean"),
        ({"num_items_in_batch": "3"}, "num_items_in_batch='3'"),
        ({"num_items_in_batch": torch.ones(2)}, r"num_items_in_batch has the shape \(2,\)"),
        ({"labels": torch.zeros(3, 11)}, "labels has the dtype float32"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels has the shape \(3,\)"),
        ({"weight": torch.zeros(V, H + 1)}, "hidden_states and weight have the shapes"),
        ({"weight": torch.zeros(0, H)}, "weight has no rows"),
        ({"weight": torch.zeros(V, H, dtype=torch.int8)}, "weight has the dtype int8"),
        ({"bias": torch.zeros(V + 1)}, rf"bias has the shape \({V + 1},\)"),
        ({"weight": torch.zeros(V, H, device="meta")}, "the tensors are on several devices"),
    ],
)
def test_what_is_wrong_is_said(changed, message):
    hidden, weight, labels, _ = made()
    given = {"hidden_states": hidden, "weight": weight, "labels": labels, **changed}
    with pytest.raises(ConfigError, match=message):
        lm_head_loss(**given)
