import attrs
import pytest
import torch
from convert_families import OWN, small_model
from torch import nn
from torch.nn.utils import parametrizations

from automodel_fn import apply, backend_plan

LINEAR, NORM = attrs.evolve(OWN, linear="te"), attrs.evolve(OWN, rms_norm="te")


def made_into_te(model, backend, gpu):
    apply(backend_plan(model, backend, availability=gpu))
    return model


@pytest.fixture
def extra(classes, monkeypatch):
    """Transformer Engine's own modules have an extra state, which a state dict would list."""
    for cls in (classes.linear, classes.rms_norm):
        monkeypatch.setattr(cls, "get_extra_state", lambda self: torch.ones(1), raising=False)
        monkeypatch.setattr(cls, "set_extra_state", lambda self, _: None, raising=False)
    assert "_extra_state" in classes.linear(2, 2).state_dict()


@pytest.mark.usefixtures("extra")
def test_an_extra_state_is_in_no_state_dict(gpu):
    model = small_model("llama")
    before = model.state_dict()
    made_into_te(model, attrs.evolve(LINEAR, rms_norm="te"), gpu)

    assert list(model.state_dict()) == list(before)
    assert model.load_state_dict(before) == ([], [])


def test_the_weights_of_a_norm_that_are_made_of_zeros_are_said_to_be(gpu, classes, monkeypatch):
    made, own = [], classes.rms_norm.__init__

    def recorded(self, *args, zero_centered_gamma=False, **kwargs):
        made.append(zero_centered_gamma)
        own(self, *args, **kwargs)

    monkeypatch.setattr(classes.rms_norm, "__init__", recorded)
    made_into_te(small_model("llama"), NORM, gpu)
    assert set(made) == {False}
    made.clear()
    made_into_te(small_model("gemma3"), NORM, gpu)
    assert set(made) == {True}


@pytest.mark.usefixtures("classes")
def test_a_parametrized_linear_is_left_alone(gpu):
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(16, 16)))
    (found,) = [
        each for each in backend_plan(model, LINEAR, availability=gpu).entries if each.name == "0"
    ]

    assert (found.action, found.reason) == ("skip", "its parameters are parametrized")


@pytest.mark.usefixtures("classes")
def test_a_weight_in_fp8_is_left_alone(gpu):
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    model[0].weight = nn.Parameter(model[0].weight.to(torch.float8_e4m3fn), requires_grad=False)
    (found, _) = backend_plan(model, LINEAR, availability=gpu).entries

    assert (found.action, found.reason) == ("skip", "its weight is stored in float8_e4m3fn")
