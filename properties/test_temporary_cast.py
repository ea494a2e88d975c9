import pytest
import torch
from corner_models import CORNERS
from hypothesis import given
from hypothesis import strategies as st

from automodel_fn.testing import check_temporary_cast, dtypes, models


@pytest.mark.parametrize("then", [None, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("corner", CORNERS)
def test_a_temporary_cast_of_a_corner_model_ends(corner, dtype, then):
    check_temporary_cast(corner(), dtype, then)


@given(models(), dtypes(castable=True), st.none() | dtypes(castable=True))
def test_a_temporary_cast_ends(model, dtype, then):
    check_temporary_cast(model, dtype, then)
