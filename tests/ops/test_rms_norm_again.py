"""Calls of the norm like earlier ones, with a stand-in for the kernels."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from automodel_fn.ops import _rms_norm_autograd
from automodel_fn.ops._rms_norm_autograd import eager_triton, eager_triton_again


def normed(x, weight, eps):
    weight = None if weight is None else weight.to(x.dtype)
    return nn.functional.rms_norm(x, x.shape[-1:], weight, eps)


class Kernels:
    """Computes by torch; remembers what it was told of calls alike, as launchers do."""

    def __init__(self):
        self.known, self.given, self.normalized = {}, [], None

    def forward_again(self, alike):
        return self.known.get(alike)

    def forward(self, x, residual, weight, eps, rounds_first, alike, again):
        self.given.append(again)
        if alike is not None:
            self.known[alike] = f"launch {len(self.known)}"
        if residual is None:
            return normed(x, weight, eps)
        return normed(x + residual, weight, eps), x + residual

    def backward(self, x, weight, dy, dsum, eps, rounds_first, *, of_weight, again):
        self.given.append(again)
        self.normalized = x
        return dy.clone(), None


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(_rms_norm_autograd, "has_triton", lambda: True)
    made = Kernels()
    monkeypatch.setattr(_rms_norm_autograd, "_kernels", lambda: made)
    return made


def arguments(**changed):
    x = torch.randn(3, 4, 8).bfloat16()
    given = {
        "x": x,
        "weight": nn.Parameter(torch.randn(8)),
        "residual": None,
        "eps": 1e-5,
        "weight_multiply": "fp32",
    }
    return {**given, **changed}


def test_a_call_like_an_earlier_one_takes_up_its_launch_in_forward_and_backward(kernels):
    assert eager_triton_again(**arguments()) is None
    eager_triton(**arguments())
    given = arguments(x=torch.randn(3, 4, 8).bfloat16().requires_grad_())
    y = eager_triton_again(**given)

    assert torch.equal(y, normed(given["x"], given["weight"], 1e-5))
    y.sum().backward()
    assert kernels.given == [None, "launch 0", "launch 0"]


def test_with_a_residual_both_come_again(kernels):
    x = torch.randn(3, 4, 8).bfloat16()
    eager_triton(**arguments(residual=x))
    given = arguments(residual=torch.randn(3, 4, 8).bfloat16())
    _, total = eager_triton_again(**given)

    assert torch.equal(total, given["x"] + given["residual"])
    assert kernels.given == [None, "launch 0"]


def test_gradients_are_given_what_was_normalized_the_sum_where_there_is_one(kernels):
    x, residual = (torch.randn(3, 4, 8).bfloat16().requires_grad_() for _ in range(2))
    eager_triton(**arguments(x=x)).sum().backward()
    assert kernels.normalized is x
    y, total = eager_triton(**arguments(x=x, residual=residual))
    y.sum().backward()

    assert torch.equal(kernels.normalized, total)


@pytest.mark.parametrize(
    "changed",
    [
        {"x": torch.ones(3, 5, 8).bfloat16()},
        {"x": torch.ones(12, 8).bfloat16()},
        {"x": torch.ones(3, 4, 8)},
        {"x": torch.ones(4, 3, 8).bfloat16().transpose(0, 1)},
        {"x": nn.Parameter(torch.ones(3, 4, 8).bfloat16())},
        {"weight": None},
        {"weight": torch.ones(8).bfloat16()},
        {"weight": torch.ones(9)},
        {"weight": torch.ones(1, 8)},
        {"weight": torch.ones(16)[::2]},
        {"weight": 1.0},
        {"residual": torch.ones(3, 4, 8)},
        {"residual": torch.ones(4, 3, 8).bfloat16().transpose(0, 1)},
        {"residual": 1.0},
        {"eps": 1e-6},
        {"weight_multiply": "input"},
        {"weight_multiply": ["fp32"]},
    ],
)
def test_what_differs_from_it_is_looked_at_anew(changed):
    eager_triton(**arguments())

    assert eager_triton_again(**arguments(**changed)) is None


@pytest.mark.parametrize(
    "residual",
    [
        None,
        torch.ones(3, 4, 8),
        torch.ones(3, 4, 9).bfloat16(),
        torch.ones(1, 4, 8).bfloat16(),
        torch.ones(12, 8).bfloat16(),
        torch.ones(4, 3, 8).bfloat16().transpose(0, 1),
        nn.Parameter(torch.ones(3, 4, 8).bfloat16()),
        1.0,
    ],
)
def test_a_residual_that_differs_from_it_is_looked_at_anew(residual):
    eager_triton(**arguments(residual=torch.ones(3, 4, 8).bfloat16()))

    assert eager_triton_again(**arguments(residual=torch.ones(3, 4, 8).bfloat16())) is not None
    assert eager_triton_again(**arguments(residual=residual)) is None


@pytest.mark.parametrize("moved", ["x", "weight", "residual"])
def test_a_tensor_on_another_device_is_looked_at_anew(moved, monkeypatch):
    given = arguments(residual=torch.ones(3, 4, 8).bfloat16())
    elsewhere = arguments(residual=torch.ones(3, 4, 8).bfloat16())[moved]
    monkeypatch.setattr(torch.Tensor, "get_device", lambda tensor: int(tensor is elsewhere))
    eager_triton(**given)

    assert eager_triton_again(**given) is not None
    assert eager_triton_again(**{**given, moved: elsewhere}) is None


@pytest.mark.parametrize("eps", [1, True])
def test_a_number_of_another_type_is_not_the_same(eps):
    eager_triton(**arguments(eps=1.0))

    assert eager_triton_again(**arguments(eps=1.0)) is not None
    assert eager_triton_again(**arguments(eps=eps)) is None


@pytest.mark.parametrize("left", ["x", "weight", "residual"])
def test_a_tensor_that_a_transform_left_behind_is_looked_at_anew(left):
    given = arguments(residual=torch.ones(3, 4, 8).bfloat16(), weight=torch.ones(8))
    eager_triton(**given)
    wrappers = []
    torch.func.grad(lambda tensor: wrappers.append(tensor) or tensor.sum())(given[left])

    assert eager_triton_again(**given) is not None
    assert eager_triton_again(**{**given, left: wrappers[0]}) is None


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_where_somebody_watches_or_transforms_nothing_is_taken_up(monkeypatch):
    eager_triton(**arguments())
    given = arguments()
    with FakeTensorMode():
        assert eager_triton_again(**given) is None
    found = []
    torch.func.vmap(lambda row: found.append(eager_triton_again(**given)) or row)(torch.ones(2, 3))
    assert found == [None]
    monkeypatch.setattr(_rms_norm_autograd, "has_triton", lambda: False)
    assert eager_triton_again(**given) is None
    monkeypatch.setattr(_rms_norm_autograd, "has_triton", lambda: True)
    assert eager_triton_again(**given) is not None
