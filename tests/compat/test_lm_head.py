from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from automodel_fn.compat import nemo
from automodel_fn.testing._twin import bits_of

FLOATS = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LENGTH, HIDDEN, VOCABULARY = 5, 4, 6


def values(shape, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


@st.composite
def arguments(draw):
    stored, dtype = draw(FLOATS), draw(FLOATS)
    is_fp32 = draw(st.booleans())
    kind = draw(st.sampled_from(["linear", "linear", "bias", "sequential", "none"]))
    seed = draw(st.integers(0, 99))
    index = st.lists(st.integers(-LENGTH, LENGTH - 1), max_size=4).map(
        lambda found: torch.tensor(found, dtype=torch.int64)
    )
    mask = st.lists(st.booleans(), min_size=LENGTH, max_size=LENGTH).map(torch.tensor)
    shape = draw(st.sampled_from([(LENGTH, HIDDEN), (1, LENGTH, HIDDEN), (2, LENGTH, HIDDEN)]))
    if kind == "sequential":
        # Of a head without a weight the original does not know the dtype.
        stored = dtype
    return {
        "head": (kind, torch.float32 if is_fp32 else stored, seed),
        "hidden_states": values(shape, dtype, seed),
        "logits_to_keep": draw(
            st.just(0) | st.integers(-LENGTH - 2, LENGTH + 2) | st.booleans() | index | mask
        ),
        "is_thd": draw(st.booleans()),
        "fp32_lm_head": is_fp32,
        "output_hidden_states": draw(st.booleans()),
    }


def head_of(kind, dtype, seed):
    if kind == "none":
        return None
    torch.manual_seed(seed)
    linear = nn.Linear(HIDDEN, VOCABULARY, bias=kind == "bias").to(dtype)
    return nn.Sequential(linear) if kind == "sequential" else linear


def demand_equal(found, expected):
    assert type(found) is type(expected)
    assert [key for key, value in found.items() if value is not None] == [
        key for key, value in expected.items() if value is not None
    ]
    assert tuple(found.keys()) == tuple(expected.keys())
    for key in ("logits", "hidden_states"):
        ours, theirs = getattr(found, key), getattr(expected, key)
        assert (ours is None) is (theirs is None), key
        if ours is not None:
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), key
            assert torch.equal(bits_of(ours), bits_of(theirs)), key


@given(arguments())
def test_logits_have_the_bits_that_they_have_in_the_original(original, arguments):
    found, expected = (
        module.compute_lm_head_logits(
            head_of(*arguments["head"]),
            *[value for name, value in arguments.items() if name != "head"],
        )
        for module in (nemo, original)
    )
    demand_equal(found, expected)
    if arguments["head"][0] == "none" and not arguments["is_thd"]:
        assert found.logits is arguments["hidden_states"]


@pytest.mark.parametrize("is_fp32", [False, True])
@pytest.mark.parametrize("shape", [(HIDDEN,), (2, 3, LENGTH, HIDDEN), (0, HIDDEN), (1, 0, HIDDEN)])
def test_any_number_of_dimensions_goes_through_as_in_the_original(original, shape, is_fp32):
    head = nn.Linear(HIDDEN, VOCABULARY)
    hidden = values(shape, torch.bfloat16, 0)
    found, expected = (
        m.compute_lm_head_logits(head, hidden, fp32_lm_head=is_fp32, output_hidden_states=True)
        for m in (nemo, original)
    )
    demand_equal(found, expected)


@pytest.mark.parametrize("index", [torch.tensor(1), torch.tensor([[0, 1], [2, 3]])])
def test_an_index_of_any_shape_selects_as_in_the_original(original, index):
    head, hidden = nn.Linear(HIDDEN, VOCABULARY), values((2, LENGTH, HIDDEN), torch.float32, 0)
    demand_equal(*(m.compute_lm_head_logits(head, hidden, index) for m in (nemo, original)))


@pytest.mark.parametrize("index", [torch.tensor([LENGTH]), torch.tensor([0.5]), "last", None])
def test_an_index_that_selects_nothing_fails_in_both(original, index):
    head, hidden = nn.Linear(HIDDEN, VOCABULARY), values((2, LENGTH, HIDDEN), torch.float32, 0)
    kinds = []
    for module in (nemo, original):
        try:
            kinds.append(module.compute_lm_head_logits(head, hidden, index).logits.shape)
        except (IndexError, TypeError, RuntimeError) as error:
            kinds.append(type(error))
    assert kinds[0] == kinds[1]


def test_gradients_are_those_of_the_original(original):
    grads = []
    for module in (nemo, original):
        torch.manual_seed(0)
        head = nn.Linear(HIDDEN, VOCABULARY)
        hidden = values((2, LENGTH, HIDDEN), torch.bfloat16, 0).requires_grad_()
        logits = module.compute_lm_head_logits(head, hidden, 2, fp32_lm_head=True).logits
        logits.sum().backward()
        grads.append([bits_of(hidden.grad), bits_of(head.weight.grad)])
    assert all(map(torch.equal, *grads))


def test_the_head_is_called_so_that_its_hooks_fire(original):
    for module in (nemo, original):
        for is_fp32 in (False, True):
            head, called = nn.Linear(HIDDEN, VOCABULARY), []
            head.register_forward_hook(lambda *args, called=called: called.append(1))
            module.compute_lm_head_logits(
                head, values((1, LENGTH, HIDDEN), torch.bfloat16, 0), fp32_lm_head=is_fp32
            )
            assert called == [1]


class Fake(nn.Linear):
    """A head of FSDP2, as far as it is asked: a stored dtype and a compute dtype."""

    def __init__(self, stored, compute):
        super().__init__(HIDDEN, VOCABULARY, dtype=stored)
        self.compute, self.seen = compute, []

    def _get_fsdp_state(self):
        return SimpleNamespace(_mp_policy=SimpleNamespace(param_dtype=self.compute))

    def forward(self, x):
        self.seen.append(x.dtype)
        return nn.functional.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


class Weightless(Fake):
    def __init__(self, stored, compute):
        super().__init__(stored, compute)
        self.held, self.weight = self.weight, None

    def forward(self, x):
        self.seen.append(x.dtype)
        return nn.functional.linear(x, self.held.to(x.dtype))


@pytest.mark.parametrize("is_fp32", [False, True])
@pytest.mark.parametrize("compute", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [Fake, Weightless])
def test_a_head_of_fsdp2_gets_its_compute_dtype(
    original, monkeypatch, kind, stored, compute, is_fp32
):
    outputs, seen = [], []
    for module in (nemo, original):
        monkeypatch.setattr(module, "FSDPModule", Fake)
        torch.manual_seed(0)
        head = kind(stored, compute)
        hidden = values((1, LENGTH, HIDDEN), torch.float32, 0)
        outputs.append(module.compute_lm_head_logits(head, hidden, 2, fp32_lm_head=is_fp32))
        seen.append(head.seen)
    demand_equal(*outputs)
    assert seen[0] == seen[1]


# What differs.


def test_a_bf16_head_can_compute_in_fp32(original):
    head = nn.Linear(HIDDEN, VOCABULARY, dtype=torch.bfloat16)
    hidden = values((1, LENGTH, HIDDEN), torch.bfloat16, 0)
    with pytest.raises(RuntimeError, match="dtype"):
        original.compute_lm_head_logits(head, hidden, fp32_lm_head=True)
    logits = nemo.compute_lm_head_logits(head, hidden, fp32_lm_head=True).logits
    expected = nn.functional.linear(hidden.float(), head.weight.float(), head.bias.float())
    assert torch.equal(bits_of(logits), bits_of(expected.to(torch.bfloat16)))
    assert head.weight.dtype == torch.bfloat16


def test_a_head_without_a_weight_gets_the_dtype_of_its_parameters(original):
    head = nn.Sequential(nn.Linear(HIDDEN, VOCABULARY, dtype=torch.bfloat16))
    hidden = values((1, LENGTH, HIDDEN), torch.float32, 0)
    with pytest.raises(RuntimeError, match="dtype"):
        original.compute_lm_head_logits(head, hidden)
    assert nemo.compute_lm_head_logits(head, hidden).logits.dtype == torch.bfloat16


def test_autocast_does_not_lower_what_is_asked_for_in_fp32(original):
    torch.manual_seed(0)
    head, hidden = nn.Linear(HIDDEN, VOCABULARY), values((1, LENGTH, HIDDEN), torch.float32, 0)
    exact = head(hidden)
    for module, same in ((nemo, True), (original, False)):
        with torch.autocast("cpu", torch.bfloat16):
            found = module.compute_lm_head_logits(head, hidden, fp32_lm_head=True).logits
        assert torch.equal(found, exact) is same


class Packed(nn.Module):
    """A head with quantized weights, which takes its input as it is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, dtype=torch.uint8), requires_grad=False)

    def forward(self, x):
        return x


def test_a_quantized_head_gets_its_input_as_it_is(original):
    hidden = values((1, LENGTH, HIDDEN), torch.bfloat16, 0)
    assert original.compute_lm_head_logits(Packed(), hidden).logits.dtype == torch.uint8
    assert nemo.compute_lm_head_logits(Packed(), hidden).logits is hidden
