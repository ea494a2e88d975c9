import pytest
import torch

from automodel_fn.bench._cast_models import Outcome, built_model, outcome_of
from automodel_fn.bench._spec import Case


def case(num_tensors=16, half_pinned=1):
    parameters = {
        "num_tensors": num_tensors,
        "rows": 4,
        "cols": 6,
        "half_pinned": half_pinned,
    }
    return Case("c", device="cpu", description="", parameters=parameters, needed_bytes=0)


def cast_but_pins(model):
    for name, parameter in model.named_parameters():
        if "mlp" not in name:
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def test_a_model_has_as_many_weights_as_asked_for_each_in_its_own_storage():
    parameters = list(built_model(case(num_tensors=24)).parameters())

    assert len(parameters) == 24
    assert len({p.untyped_storage().data_ptr() for p in parameters}) == 24
    assert {tuple(p.shape) for p in parameters} == {(4, 6)}
    assert len({tuple(p.flatten().tolist()) for p in parameters}) == 24


def test_a_model_is_the_same_whenever_it_is_built():
    first, second = built_model(case()), built_model(case())

    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_right_cast_is_found_right():
    model = cast_but_pins(built_model(case()))

    assert outcome_of(model, case()) == Outcome(True, are_pins_exact=True, num_pins=8)


def test_without_pins_there_is_nothing_to_say_of_them():
    model = built_model(case(half_pinned=0)).to(torch.bfloat16)

    found = outcome_of(model, case(half_pinned=0))
    assert found == Outcome(True, are_pins_exact=None, num_pins=0)


def test_doing_nothing_is_found():
    assert outcome_of(built_model(case()), case()) == Outcome(
        False, are_pins_exact=True, num_pins=8
    )


@pytest.mark.parametrize("spoil", ["lost_bits", "lost_dtype", "last_bit"])
def test_a_spoiled_pin_is_found(spoil):
    model = cast_but_pins(built_model(case()))
    pin = next(p for name, p in model.named_parameters() if "mlp" in name)
    if spoil == "last_bit":
        pin.data.view(torch.int32)[0, 0] ^= 1
    else:
        rounded = pin.data.to(torch.bfloat16)
        pin.data = rounded if spoil == "lost_dtype" else rounded.float()

    assert outcome_of(model, case()) == Outcome(True, are_pins_exact=False, num_pins=8)


def test_a_wrongly_rounded_weight_is_found():
    model = cast_but_pins(built_model(case()))
    weight = next(p for name, p in model.named_parameters() if "mlp" not in name)
    weight.data.view(torch.int16)[0, 0] ^= 1

    assert outcome_of(model, case()) == Outcome(False, are_pins_exact=True, num_pins=8)
