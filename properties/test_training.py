import pytest
import torch
from corner_models import CORNERS
from hypothesis import given
from hypothesis import strategies as st
from torch.optim import SGD, AdamW

from automodel_fn.testing import check_training_goes_on, dtypes, models

OPTIMIZERS = {
    "adamw": lambda parameters: AdamW(parameters, lr=0.1),
    "adamw foreach": lambda parameters: AdamW(parameters, lr=0.1, foreach=True),
    "adamw fused": lambda parameters: AdamW(parameters, lr=0.1, fused=True),
    "sgd momentum": lambda parameters: SGD(parameters, lr=0.1, momentum=0.9),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("corner", CORNERS)
def test_training_of_a_corner_model_goes_on(corner, optimizer):
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        check_training_goes_on(corner(), dtype, OPTIMIZERS[optimizer])


@given(models(), dtypes(castable=True), st.sampled_from(tuple(OPTIMIZERS)))
def test_training_goes_on(model, dtype, optimizer):
    check_training_goes_on(model, dtype, OPTIMIZERS[optimizer])
