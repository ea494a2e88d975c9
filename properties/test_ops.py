import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from automodel_fn.testing import (
    check_lm_head_logits,
    check_rms_norm,
    check_rms_norm_residual,
    check_rms_norm_scale,
    check_rope_config,
    check_swiglu,
    lm_head_arguments,
    norm_arguments,
    residual_arguments,
    rope_parameters,
    swiglu_arguments,
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


@given(residual_arguments())
@example(
    norm_of([1.0, 3.0], torch.bfloat16, 1.5, "fp32") | {"residual": torch.tensor([[2.0**-9, 0.0]])}
)
def test_a_norm_with_a_residual_is_that_of_the_rounded_sum(arguments):
    check_rms_norm_residual(**arguments)


@given(
    st.lists(st.integers(-255, 255).map(lambda n: n / 16), min_size=1, max_size=9),
    st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    st.sampled_from((0.0, 2.0**-60, 1e-5, 0.5)),
    st.integers(-8, 8),
)
def test_a_norm_does_not_depend_on_the_scale_of_its_input(values, dtype, eps, exponent):
    check_rms_norm_scale(torch.tensor([values]).to(dtype), eps, exponent)


@given(swiglu_arguments())
@example({"gate": torch.tensor([-88.8, -200.0, 90.0]), "up": torch.tensor([2.0, 1e30, 1e30])})
@example({"gate": torch.tensor([float("inf"), -float("inf")]), "up": torch.ones(2)})
@example({"gate": torch.tensor([float("nan"), -0.0]).half(), "up": torch.tensor([1.0, 3.0]).half()})
def test_swiglu_is_off_by_its_roundings_only(arguments):
    check_swiglu(**arguments)


@given(lm_head_arguments())
@example({"lm_head": nn.Linear(3, 2), "hidden_states": torch.ones(2, 0, 3)})
def test_logits_are_those_of_the_kept_positions(arguments):
    check_lm_head_logits(**arguments)


@given(rope_parameters())
def test_every_spelling_of_a_rotary_embedding_is_read_alike(parameters):
    check_rope_config(parameters)
