import torch
from hypothesis import example, given

from automodel_fn.testing import check_lm_head_loss, lm_head_loss_arguments


def ignored(dtype, reduction):
    return {
        "hidden_states": torch.ones(2, 3, dtype=dtype),
        "weight": torch.ones(4, 3, dtype=dtype),
        "labels": torch.full((2,), -100),
        "reduction": reduction,
    }


@given(lm_head_loss_arguments())
@example(ignored(torch.bfloat16, "mean"))
@example(ignored(torch.float16, "none"))
def test_in_chunks_of_any_size_the_loss_is_that_of_all_logits(arguments):
    check_lm_head_loss(**arguments)
