import pytest
import torch
from corner_models import CORNERS
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_fn.testing import check_all_or_nothing, dtypes, models
from automodel_fn.testing._laws_atomic import EFFECTS

# While one works, some operations of each made-up model; in CI and at night every one.
MAX_PLACES = 20 if settings().max_examples <= 25 else 10**6


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("corner", CORNERS)
def test_what_fails_on_a_corner_model_leaves_nothing_in_between(corner, effect):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_all_or_nothing(corner(), dtype, effects=[effect])


@pytest.mark.parametrize("effect", EFFECTS)
@given(models(), dtypes(castable=True), st.sampled_from(("persistent", "all")))
def test_what_fails_leaves_nothing_in_between(effect, model, dtype, buffers):
    options = {"effects": [effect], "max_places": MAX_PLACES, "buffers": buffers}
    check_all_or_nothing(model, dtype, **options)
