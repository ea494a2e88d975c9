import pytest
import torch
from corner_models import CORNERS
from hypothesis import given

from automodel_fn.testing import check_all_or_nothing, dtypes, models


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("corner", CORNERS)
def test_a_failed_cast_of_a_corner_model_leaves_nothing_in_between(corner, dtype):
    check_all_or_nothing(corner(), dtype)


@given(models(), dtypes(castable=True))
def test_a_failed_cast_leaves_nothing_in_between(model, dtype):
    check_all_or_nothing(model, dtype, buffers="all")
