import copy

import pytest
import torch
from torch import nn

from automodel_fn import lm_head_logits
from automodel_fn.testing import check_lm_head_logits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]

by_dtype = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])


@pytest.mark.parametrize("precision", [None, "fp32"])
@by_dtype
def test_the_law_of_the_logits_holds(dtype, precision):
    lm_head = nn.Linear(256, 1000, dtype=dtype, device="cuda")
    hidden = torch.randn(2, 33, 256, device="cuda")
    for keep in (0, 1, torch.tensor([3, 0], device="cuda")):
        check_lm_head_logits(copy.deepcopy(lm_head), hidden, keep, precision=precision)


def test_fp32_logits_are_not_undone_by_autocast():
    lm_head = nn.Linear(256, 1000, device="cuda")
    hidden = torch.randn(2, 33, 256, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        found = lm_head_logits(lm_head, hidden, precision="fp32").logits
    assert torch.equal(found, lm_head(hidden))


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_positions_on_the_gpu_are_not_waited_for():
    lm_head = nn.Linear(16, 8, device="cuda")
    hidden, keep = torch.randn(1, 4, 16, device="cuda"), torch.tensor([1], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        lm_head_logits(lm_head, hidden, logits_to_keep=keep)
    finally:
        torch.cuda.set_sync_debug_mode("default")
