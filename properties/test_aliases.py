import pytest
import torch
from corner_models import CORNERS
from hypothesis import given
from hypothesis import strategies as st

from automodel_fn.testing import check_aliases_kept, dtypes, models, pin_patterns


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("corner", CORNERS)
def test_a_cast_of_a_corner_model_keeps_its_aliases(corner, dtype):
    check_aliases_kept(corner(), dtype)


@given(models(), dtypes(castable=True), st.data())
def test_a_cast_keeps_ties_shared_buffers_and_storages(model, dtype, data):
    buffers = data.draw(st.sampled_from(("persistent", "all", "none")))
    check_aliases_kept(model, dtype, keep_fp32=data.draw(pin_patterns(model)), buffers=buffers)
