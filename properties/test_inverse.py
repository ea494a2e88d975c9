import pytest
import torch
from corner_models import CORNERS
from hypothesis import given

from automodel_fn.testing import check_inverse, check_undo, dtypes, models

LAWS = pytest.mark.parametrize("law", [check_inverse, check_undo])


@LAWS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("corner", CORNERS)
def test_a_cast_of_a_corner_model_has_a_way_back(corner, dtype, law):
    law(corner(), dtype)


@given(models(), dtypes(castable=True))
def test_the_inverse_brings_every_dtype_back(model, dtype):
    check_inverse(model, dtype)


@given(models(), dtypes(castable=True))
def test_undo_brings_every_bit_back(model, dtype):
    check_undo(model, dtype, buffers="all")
