import pytest
import torch
from corner_models import CORNERS
from hypothesis import given
from hypothesis import strategies as st

from automodel_fn.testing import check_plan_is_pure, dtypes, models, pin_patterns


@pytest.mark.parametrize("corner", CORNERS)
def test_a_plan_of_a_corner_model_is_pure(corner):
    check_plan_is_pure(corner(), torch.bfloat16)


@given(models(), dtypes(castable=True), st.data())
def test_a_plan_is_pure(model, dtype, data):
    patterns = pin_patterns(model)
    check_plan_is_pure(model, dtype, keep_fp32=data.draw(patterns), skip=data.draw(patterns))
