import pytest
import torch
from corner_models import CORNERS
from hypothesis import example, given
from hypothesis import strategies as st

from automodel_fn.testing import check_cast_exact, dtypes, models, pin_patterns, tensors

CASTABLE = (torch.bfloat16, torch.float16, torch.float32)
MATCHES = st.sampled_from(("substring", "segment"))
BUFFERS = st.sampled_from(("persistent", "all", "none"))


@pytest.mark.parametrize("dtype", CASTABLE)
@pytest.mark.parametrize("corner", CORNERS)
def test_a_cast_of_a_corner_model_is_exact(corner, dtype):
    check_cast_exact(corner(), dtype)


@given(models(), dtypes(castable=True), MATCHES, BUFFERS)
def test_a_cast_is_exact(model, dtype, match, buffers):
    check_cast_exact(model, dtype, match=match, buffers=buffers)


@given(models(), dtypes(castable=True), st.data())
def test_a_cast_is_exact_whatever_is_pinned_and_skipped(model, dtype, data):
    patterns = pin_patterns(model)
    check_cast_exact(model, dtype, keep_fp32=data.draw(patterns), skip=data.draw(patterns))


@given(dtypes().flatmap(tensors), dtypes(castable=True))
@example(torch.tensor([1.00390625]), torch.bfloat16)
@example(torch.tensor([1.01171875]), torch.bfloat16)
@example(torch.tensor([-0.0, 1e-45, float("inf")]), torch.bfloat16)
@example(
    torch.tensor([0x7F800001, 0x7FC00123], dtype=torch.int32).view(torch.float32), torch.float16
)
@example(torch.tensor([3.4028235e38]), torch.bfloat16)
@example(torch.zeros(0, 3).t(), torch.bfloat16)
def test_one_tensor_is_cast_as_torch_does_it(tensor, dtype):
    module = torch.nn.Module()
    module.register_buffer("table", tensor)
    check_cast_exact(module, dtype)
