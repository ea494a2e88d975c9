import pytest
import torch
from torch import nn

from automodel_fn import StepContext, apply, bf16, cast_plan
from automodel_fn.cli import _checks as checks

FIRST, LAST = StepContext(True), StepContext(False, optim_step=True)


def model_with_pin():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    nn.init.normal_(model[1].weight)
    return model, cast_plan(model, bf16, keep_fp32="1.weight")


def test_pins_that_kept_every_bit_pass():
    model, plan = model_with_pin()
    expected = checks.pin_bits(model, plan)
    apply(plan)
    check = checks.check_pins_exact(model, expected)

    assert list(expected) == ["1.weight"]
    assert check.passed
    assert check.evidence == "1 pins compared as integers"


def test_one_bit_of_a_pin_is_noticed():
    model, plan = model_with_pin()
    expected = checks.pin_bits(model, plan)
    model[1].weight.data.view(torch.int32)[0] ^= 1

    check = checks.check_pins_exact(model, expected)
    assert check.passed is False
    assert check.evidence == "changed: 1.weight"


def test_pins_that_prove_nothing_are_counted():
    model, plan = model_with_pin()
    nn.init.ones_(model[1].weight)
    check = checks.check_pins_exact(model, checks.pin_bits(model, plan))

    assert check.evidence.endswith("1 hold only values that bfloat16 can hold as well")


def test_without_pins_nothing_is_claimed():
    model = nn.Linear(2, 2)
    plan = cast_plan(model, bf16)

    exact = checks.check_pins_exact(model, checks.pin_bits(model, plan))
    assert exact.passed is None
    assert checks.check_pins_fp32(model, plan).verdict == "not checked"


def test_a_pin_that_was_cast_is_noticed_at_the_end():
    model, plan = model_with_pin()
    assert checks.check_pins_fp32(model, plan).passed
    model.to(bf16)

    assert checks.check_pins_fp32(model, plan).evidence == "not float32: 1.weight"


def test_dtypes_are_those_of_the_plan():
    model, plan = model_with_pin()
    assert checks.check_dtypes(model, plan).passed is False
    apply(plan)

    assert checks.check_dtypes(model, plan).evidence == "4 tensors"


def test_reads_of_the_own_step_pass():
    check = checks.check_steps([FIRST, LAST], [[FIRST] * 2, [LAST]], None)

    assert check.passed
    assert check.evidence == "3 reads in 2 microbatches"


@pytest.mark.parametrize("reads", [[], [FIRST], [LAST, FIRST], [StepContext()]])
def test_no_read_or_one_of_another_step_fails(reads):
    check = checks.check_steps([FIRST, LAST], [[FIRST], reads], None)

    assert check.passed is False
    assert check.evidence.startswith("microbatch 2: expected StepContext(first_microbatch=False")


def test_recomputes_that_did_not_happen_fail():
    check = checks.check_steps([FIRST], [[FIRST]], 0)

    assert check.passed is False
    assert "nothing was recomputed" in check.evidence


def test_no_step_is_not_checked():
    assert checks.check_steps([], [], None).passed is None


@pytest.mark.parametrize(
    ("before", "after", "steps", "passed"),
    [
        (2.0, 1.0, 20, True),
        (2.0, 2.0, 20, False),
        (2.0, float("nan"), 20, False),
        (2.0, 1.0, 19, None),
        (2.0, None, 20, None),
    ],
)
def test_the_loss_must_fall(before, after, steps, passed):
    assert checks.check_loss(before, after, steps).passed is passed


def test_a_loaded_model_must_have_every_tensor_and_bit():
    model, loaded = nn.Linear(2, 2), nn.Linear(2, 2)
    loaded.load_state_dict(model.state_dict())
    assert checks.check_saved(model, loaded).passed

    with torch.no_grad():
        loaded.bias[0] += 1
    assert checks.check_saved(model, loaded).evidence == "differ: bias"
    assert checks.check_saved(model, nn.Linear(2, 2, bias=False)).passed is False


def test_minus_zero_is_not_zero():
    model, loaded = nn.Linear(1, 1), nn.Linear(1, 1)
    for each, value in ((model, 0.0), (loaded, -0.0)):
        nn.init.constant_(each.weight, value)
        nn.init.constant_(each.bias, 0.0)

    assert checks.check_saved(model, loaded).evidence == "differ: weight"
