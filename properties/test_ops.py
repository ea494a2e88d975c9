import torch
from hypothesis import example, given
from torch import nn

from automodel_fn.testing import (
    check_lm_head_logits,
    check_rms_norm,
    check_rope_config,
    lm_head_arguments,
    norm_arguments,
    rope_parameters,
)


def norm_of(values, dtype, weight, weight_multiply):
    x = torch.tensor([values]).to(dtype)
    return {
        "x": x,
        "weight": torch.full((len(values),), weight),
        "eps": 1e-5,
        "weight_multiply": weight_multiply,
    }


@given(norm_arguments())
@example(norm_of([-0.0, 1e-45, -1e-40], torch.float32, 1.0, "fp32"))
@example(norm_of([0.0, 0.0], torch.bfloat16, 3.0, "input"))
@example(norm_of([2.0**62, 1.0], torch.bfloat16, 1.00390625, "input"))
@example(norm_of([2.0**70, 1.0], torch.float32, 1.0, "fp32"))
@example(norm_of([60000.0, 0.0], torch.float16, 60000.0, "fp32"))
@example(norm_of([float("inf"), 1.0], torch.float32, 1.0, "fp32"))
@example(norm_of([float("nan"), 1.0], torch.float16, 1.0, "input"))
def test_a_norm_is_off_by_its_roundings_only(arguments):
    check_rms_norm(**arguments)


@given(lm_head_arguments())
@example({"lm_head": nn.Linear(3, 2), "hidden_states": torch.ones(2, 0, 3)})
def test_logits_are_those_of_the_kept_positions(arguments):
    check_lm_head_logits(**arguments)


@given(rope_parameters())
def test_every_spelling_of_a_rotary_embedding_is_read_alike(parameters):
    check_rope_config(parameters)
