import pytest
import torch
from corner_models import CORNERS
from hypothesis import given
from hypothesis import strategies as st

from automodel_fn.testing import check_notes, dtypes, models, pin_patterns


@pytest.mark.parametrize("match", ["substring", "segment"])
@pytest.mark.parametrize("corner", CORNERS)
def test_the_plan_of_a_corner_model_notes_what_deserves_it(corner, match):
    check_notes(corner(), torch.bfloat16, match=match)


@given(models(), dtypes(castable=True), st.sampled_from(("substring", "segment")), st.data())
def test_a_plan_notes_what_deserves_it(model, dtype, match, data):
    check_notes(model, dtype, match=match, keep_fp32=data.draw(pin_patterns(model)))
