import pytest
import torch
from torch import Tensor

from automodel_fn import lm_head_loss
from automodel_fn.testing import _laws_loss, check_lm_head_loss

H, V = 16, 2000


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, by):
        ctx.by = by
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.by, None


def with_loss(change):
    def wrong(*args, **options):
        found = lm_head_loss(*args, **options)
        return found._replace(loss=change(found.loss))

    return wrong


def with_gradient_of(index, by):
    def wrong(*args, bias=None, **options):
        given = [*args, bias]
        given[index] = Scaled.apply(given[index], by)
        return lm_head_loss(*given[:3], bias=given[3], **options)

    return wrong


def of_rounded_logits(hidden, weight, labels, *, bias, **options):
    logits = torch.nn.functional.linear(hidden.bfloat16(), weight.bfloat16(), bias.bfloat16())
    eye = torch.eye(V)
    return lm_head_loss(logits.float(), eye, labels, **options)


def that_changes(index):
    def wrong(*args, **options):
        found = lm_head_loss(*args, **options)
        args[index].data[0] += 1
        return found

    return wrong


WRONG = {
    "another dtype": (with_loss(Tensor.double), "the loss is torch.float64"),
    "another shape": (with_loss(lambda loss: loss.reshape(1)), "the loss has the shape"),
    "a loss off by 1e-3": (with_loss(lambda loss: loss * 1.001), "the loss is"),
    "logits in bf16": (of_rounded_logits, "the loss is|the gradient of"),
    "gradient of hidden states": (with_gradient_of(0, 1.01), "the gradient of hidden_states"),
    "gradient of the weight": (with_gradient_of(1, 1.01), "the gradient of weight"),
    "gradient of the bias": (with_gradient_of(3, 1.01), "the gradient of bias"),
    "hidden states that change": (that_changes(0), "changed what it was given"),
    "a weight that changes": (that_changes(1), "changed what it was given"),
}


def test_the_law_gives_tensors_in_their_own_strides(monkeypatch):
    seen = []

    def watching(*args, **options):
        seen.extend(tensor.stride() for tensor in args)
        return lm_head_loss(*args, **options)

    monkeypatch.setattr(_laws_loss, "lm_head_loss", watching)
    hidden, weight = torch.randn(6, 2 * H)[:, ::2], torch.randn(H, 9).t()
    labels = torch.randint(0, 9, (6, 2))[:, 0]
    check_lm_head_loss(hidden, weight, labels)

    assert seen == [(2 * H, 2), (1, 9), (2,)]


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("shift", [False, True])
def test_the_law_of_the_loss_notices(monkeypatch, wrong, message, shift):
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(6, H), torch.randn(V, H), torch.randn(V)
    labels = torch.randint(6, V, (6,))
    check_lm_head_loss(hidden, weight, labels, bias=bias, shift=shift)
    monkeypatch.setattr(_laws_loss, "lm_head_loss", wrong)
    with pytest.raises(AssertionError, match=message):
        check_lm_head_loss(hidden, weight, labels, bias=bias, shift=shift)
