import pytest
import torch

from automodel_fn.cli._training import fill_pins


@pytest.mark.parametrize("start", [0.0, 1.0, -(2.0**20)])
def test_a_filled_pin_has_no_element_that_bf16_can_hold(start):
    pin = torch.full((64,), start)

    fill_pins([pin], seed=0)

    assert not (pin.bfloat16().float() == pin).any()
    torch.testing.assert_close(pin, torch.full((64,), start), atol=0.01, rtol=1e-5)


def test_pins_are_filled_alike_for_one_seed():
    first, second = torch.zeros(8), torch.zeros(8)

    fill_pins([first], seed=3)
    fill_pins([second], seed=3)

    assert torch.equal(first, second)
