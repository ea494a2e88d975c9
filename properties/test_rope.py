import torch
from hypothesis import example, given
from hypothesis import strategies as st

from automodel_fn import RopeConfig
from automodel_fn.testing import check_relative_positions, check_rope, rope_arguments


def heads_of(values, dtype, *, cos=0.0, sin=1.0):
    x = torch.tensor(values).to(dtype).reshape(1, 1, 1, -1)
    half = len(values) // 2
    return {"q": x, "k": x, "cos": torch.full((1, half), cos), "sin": torch.full((1, half), sin)}


@given(rope_arguments())
@example(heads_of([-0.0, 0.0], torch.float32))
@example(heads_of([1e-45, -1e-40], torch.float32, cos=0.5, sin=0.5))
@example(heads_of([1.00390625, 1.01171875], torch.bfloat16, cos=0.6, sin=0.8))
@example(heads_of([30000.0, -30000.0], torch.float16, cos=0.6, sin=0.8))
def test_every_pair_is_turned_by_the_angle_of_its_position(arguments):
    check_rope(**arguments)


values = st.floats(-100.0, 100.0, width=32)


@given(
    half=st.integers(1, 4),
    data=st.data(),
    theta=st.sampled_from((1.0, 100.0, 5e5)),
    positions=st.tuples(st.integers(0, 99), st.integers(0, 99)),
    shift=st.integers(0, 99),
)
def test_only_the_distance_between_positions_counts(half, data, theta, positions, shift):
    q, k = (
        torch.tensor(data.draw(st.lists(values, min_size=2 * half, max_size=2 * half)))
        for _ in range(2)
    )
    check_relative_positions(q, k, RopeConfig(theta), positions=positions, shift=shift)
