"""At most two graphs, forward and backward, for fifty shapes of one rank without a 0 or a 1."""

import pytest
import torch
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_compiler

from automodel_fn import LMHead, apply_rope, lm_head_logits, lm_head_loss, rms_norm_fp32, swiglu
from automodel_fn.ops._logits_product import logits_product
from automodel_fn.ops._swiglu_packed import swiglu_packed

bf16 = torch.bfloat16
# Every dimension changes, and so does which of them are equal.
SHAPES = [(2 + step % 3, 3 + step, 4 + 2 * (7 * step % 11)) for step in range(50)]


def vocabulary(size):
    return 2 * size + 3


def normed(b, s, h):
    return torch.randn(b, s, h).to(bf16), torch.randn(h)


def summed(b, s, h):
    return (*normed(b, s, h), torch.randn(b, s, h).to(bf16))


def gated(b, s, h):
    return torch.randn(2, b, s, h).to(bf16).unbind()


def packed(b, s, h):
    return (torch.randn(b, s, h).to(bf16),)


def heads(b, s, h):
    cos, sin = torch.randn(2, s, h // 2).unbind()
    return torch.randn(b, s, 3, h), torch.randn(b, s, 2, h), cos, sin


def projected(b, s, h):
    return torch.randn(b, s, h).to(bf16), torch.randn(vocabulary(h), h)


def labelled(b, s, h):
    return (*projected(b, s, h), torch.randint(0, vocabulary(h), (b, s)))


OPS = {
    "rms_norm_fp32": (normed, lambda x, w: rms_norm_fp32(x, w, 1e-5)),
    "rms_norm_fp32, input": (
        normed,
        lambda x, w: rms_norm_fp32(x, w, 1e-5, weight_multiply="input"),
    ),
    "rms_norm_fp32, residual": (summed, lambda x, w, r: rms_norm_fp32(x, w, 1e-5, residual=r)),
    "swiglu": (gated, swiglu),
    "swiglu_packed": (packed, swiglu_packed),
    "apply_rope": (heads, apply_rope),
    "lm_head_loss": (labelled, lambda x, w, y: lm_head_loss(x, w, y, shift=True).loss),
    "lm_head_loss, none": (labelled, lambda x, w, y: lm_head_loss(x, w, y, reduction="none").loss),
    **{
        f"lm_head_logits, {precision}": (
            projected,
            lambda x, w, precision=precision: logits_product(x, w, None, precision=precision),
        )
        for precision in ("fp32", "bf16x3", "bf16")
    },
}


@pytest.fixture
def compiled():
    """Compiles down to graphs of each kind, and counts them."""
    counts = {"forward": 0, "backward": 0}

    def kind(name):
        def keep(graph, example_inputs):
            counts[name] += 1
            return graph.forward

        return make_boxed_compiler(keep)

    forward = kind("forward")
    backend = aot_autograd(
        fw_compiler=forward, inference_compiler=forward, bw_compiler=kind("backward")
    )
    torch._dynamo.reset()
    yield lambda function: torch.compile(function, backend=backend, fullgraph=True), counts
    torch._dynamo.reset()


def is_table(name, index):
    return name == "apply_rope" and index > 1


@pytest.mark.parametrize("name", OPS)
def test_forwards_need_two_graphs(compiled, name):
    make, function = OPS[name]
    start, counts = compiled
    used = start(function)
    for shape in SHAPES:
        used(*make(*shape))

    assert 1 <= counts["forward"] <= 2


@pytest.mark.parametrize("name", OPS)
def test_forwards_with_backwards_need_two_graphs_each(compiled, name):
    make, function = OPS[name]
    start, counts = compiled
    used = start(function)
    for shape in SHAPES:
        given = make(*shape)
        leaves = [x for i, x in enumerate(given) if x.is_floating_point() and not is_table(name, i)]
        for leaf in leaves:
            leaf.requires_grad_()
        found = used(*given)
        found = found if isinstance(found, tuple) else (found,)
        torch.autograd.backward(found, [torch.randn_like(x) for x in found])

        assert all(leaf.grad is not None for leaf in leaves)
    assert 1 <= counts["forward"] <= 2
    assert 1 <= counts["backward"] <= 2


@pytest.mark.parametrize("precision", ["fp32", "bf16x3", "bf16"])
@pytest.mark.parametrize("is_wanted", [False, True])
def test_heads_need_two_graphs_for_fifty_lengths_and_numbers_of_kept_positions(
    compiled, precision, is_wanted
):
    head = LMHead(8, 11, precision=precision)
    start, counts = compiled
    used = start(lambda x, keep: lm_head_logits(head, x, logits_to_keep=keep).logits)
    for batch, length, _ in SHAPES:
        x = torch.randn(batch, length, 8).to(bf16).requires_grad_(is_wanted)
        found = used(x, 2 + length // 3 if length > 3 else 2)
        if is_wanted:
            found.sum().backward()

    assert 1 <= counts["forward"] <= 2
    assert counts["backward"] <= 2
