import pytest
import torch

from automodel_fn import RopeConfig, apply_rope, rope_tables
from automodel_fn.testing import check_relative_positions, check_rope

TABLES = rope_tables(RopeConfig(100.0), 4, 9)


@pytest.fixture
def arguments():
    q, k = torch.randn(2, 3, 2, 6), torch.randn(2, 3, 1, 6)
    ids = torch.tensor([[0, 1, 2], [3, 4, 8]])
    return {"q": q, "k": k, "cos": TABLES.cos, "sin": TABLES.sin, "position_ids": ids}


def turns_back(q, k, cos, sin, **options):
    return apply_rope(q, k, cos, -sin, **options)


def pairs_otherwise(q, k, cos, sin, *, interleaved, **options):
    return apply_rope(q, k, cos, sin, interleaved=not interleaved, **options)


def turns_queries_only(q, k, cos, sin, **options):
    return apply_rope(q, k, cos, sin, **options)[0], k.clone()


def rounds_the_input(q, k, cos, sin, **options):
    found = apply_rope(q.bfloat16(), k.bfloat16(), cos, sin, **options)
    return tuple(x.float() for x in found)


def turns_the_rest_too(q, k, cos, sin, **options):
    found = apply_rope(q, k, cos, sin, **options)
    return tuple(torch.cat([x[..., :4], x[..., 4:] * 1.001], -1) for x in found)


def differs_with_gradients(q, k, cos, sin, **options):
    found = apply_rope(q, k, cos, sin, **options)
    return tuple(torch.nextafter(x, x + 1) if q.requires_grad else x for x in found)


def differs_packed(q, k, cos, sin, **options):
    found = apply_rope(q, k, cos, sin, **options)
    return tuple(torch.nextafter(x, x + 1) if q.dim() == 3 else x for x in found)


def changes_its_input(q, k, cos, sin, **options):
    found = apply_rope(q, k, cos, sin, **options)
    if not q.requires_grad and q.dim() == 4:
        q[0, 0, 0, 0] += 1
    return found


def gives_another_dtype(q, k, cos, sin, **options):
    return tuple(x.double() for x in apply_rope(q, k, cos, sin, **options))


@pytest.mark.parametrize(
    "wrong",
    [
        turns_back,
        pairs_otherwise,
        turns_queries_only,
        rounds_the_input,
        turns_the_rest_too,
        differs_with_gradients,
        differs_packed,
        changes_its_input,
        gives_another_dtype,
    ],
)
def test_a_rotation_that_is_wrong_is_told(stand_in, arguments, wrong):
    check_rope(**arguments)
    stand_in("rope", "apply_rope", wrong)
    with pytest.raises(AssertionError, match="apply_rope"):
        check_rope(**arguments)


class Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 1.001


def has_a_wrong_gradient(q, k, cos, sin, **options):
    return apply_rope(Forward.apply(q), Forward.apply(k), cos, sin, **options)


def test_a_gradient_that_is_wrong_is_told(stand_in, arguments):
    stand_in("rope", "apply_rope", has_a_wrong_gradient)
    with pytest.raises(AssertionError, match="a gradient"):
        check_rope(**arguments)


def test_a_rotation_that_rounds_twice_is_told(stand_in):
    q, k = torch.randn(2, 64, 64, 1, 4).bfloat16().unbind(0)
    given = {"cos": torch.full((64, 2), 0.6), "sin": torch.full((64, 2), 0.8)}
    check_rope(q, k, **given)

    def rounds_twice(q, k, cos, sin, **options):
        first = apply_rope(q, k, cos, torch.zeros_like(sin), **options)
        second = apply_rope(q, k, torch.zeros_like(cos), sin, **options)
        return tuple(x + y for x, y in zip(first, second, strict=True))

    stand_in("rope", "apply_rope", rounds_twice)
    with pytest.raises(AssertionError, match="allowed is"):
        check_rope(q, k, **given)


def longer(q, k, cos, sin, **options):
    return tuple(x * 1.01 for x in apply_rope(q, k, cos, sin, **options))


def by_square(q, k, cos, sin, *, position_ids):
    return apply_rope(q, k, cos, sin, position_ids=position_ids**2 % len(cos))


@pytest.mark.parametrize(("wrong", "match"), [(longer, "length"), (by_square, "a score of")])
def test_lengths_that_change_and_positions_that_are_not_relative_are_told(stand_in, wrong, match):
    q, k = torch.tensor([1.0, 2.0, 0.5, 4.0]), torch.tensor([0.5, -1.0, 3.0, 1.0])
    given = {"positions": (2, 7), "shift": 5}
    check_relative_positions(q, k, RopeConfig(100.0), **given)
    stand_in("rope", "apply_rope", wrong)
    with pytest.raises(AssertionError, match=match):
        check_relative_positions(q, k, RopeConfig(100.0), **given)
