import pytest
import torch
from corner_models import CORNERS
from hypothesis import given
from hypothesis import strategies as st

from automodel_fn.testing import check_frozen_plan, dtypes, models

MIXED = ("base", "all", "none")


@pytest.mark.parametrize("mixed", MIXED)
@pytest.mark.parametrize("corner", CORNERS)
def test_the_frozen_plan_of_a_corner_model_is_as_the_rules_say(corner, mixed):
    check_frozen_plan(corner(), torch.bfloat16, mixed)


@given(
    models(),
    dtypes(castable=True),
    st.sampled_from(MIXED),
    st.sampled_from(("all", "persistent", "none")),
)
def test_the_frozen_plan_is_as_the_rules_say(model, dtype, mixed, buffers):
    check_frozen_plan(model, dtype, mixed, buffers=buffers)
