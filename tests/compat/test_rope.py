from types import MappingProxyType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from automodel_fn import ConfigError
from automodel_fn.compat import nemo
from automodel_fn.testing import rope_parameters


@given(rope_parameters())
def test_a_flat_config_gives_what_the_original_gives(original, parameters):
    config = SimpleNamespace(rope_parameters=parameters)
    theta, found, part = nemo.get_rope_config(config)
    expected = original.get_rope_config(config)
    assert (theta, found, part) == expected
    assert [type(theta), type(part)] == [type(expected[0]), type(expected[2])]
    assert found is parameters is expected[1]


@given(st.sampled_from([None, "yes", 0, -1, [1e4]]), st.sampled_from([None, 0, "half"]))
def test_values_of_any_kind_are_passed_through_as_by_the_original(original, theta, part):
    config = SimpleNamespace(
        rope_parameters={"rope_theta": theta, "partial_rotary_factor": part}, rope_theta=1.0
    )
    assert nemo.get_rope_config(config) == original.get_rope_config(config)


def test_any_mapping_will_do(original):
    config = SimpleNamespace(rope_parameters=MappingProxyType({"rope_theta": 1e4}))
    assert nemo.get_rope_config(config) == original.get_rope_config(config)
    assert nemo.get_rope_config(config)[1] is config.rope_parameters


def test_a_config_of_transformers_gives_what_the_original_gives(original):
    from transformers import LlamaConfig

    for config in (LlamaConfig(), LlamaConfig(rope_parameters={"rope_theta": 5e5})):
        found = nemo.get_rope_config(config)
        assert found == original.get_rope_config(config)
        assert found[1] is config.rope_parameters


UNREAD = {
    "no rope_parameters": ({"rope_theta": 1e4}, AttributeError),
    "None": ({"rope_parameters": None, "rope_theta": 1e4}, TypeError),
    "no theta": ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 1e4}, KeyError),
    "empty": ({"rope_parameters": {}, "rope_theta": 1e4}, KeyError),
}


@pytest.mark.parametrize(("attributes", "error"), UNREAD.values(), ids=list(UNREAD))
def test_an_older_theta_is_found_where_the_original_raises(attributes, error, original):
    config = SimpleNamespace(**attributes)
    with pytest.raises(error):
        original.get_rope_config(config)
    theta, parameters, part = nemo.get_rope_config(config)
    assert (theta, part) == (1e4, 1.0)
    assert parameters["rope_theta"] == 1e4
    assert type(parameters) is dict


def test_parameters_by_layer_type_are_an_error_that_names_the_way_to_read_them(original):
    nested = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    config = SimpleNamespace(rope_parameters=nested)
    with pytest.raises(KeyError):
        original.get_rope_config(config)
    with pytest.raises(ConfigError, match=r"use automodel_fn\.rope_config"):
        nemo.get_rope_config(config)


def test_a_config_that_says_nothing_is_an_error(original):
    with pytest.raises(AttributeError):
        original.get_rope_config(SimpleNamespace())
    with pytest.raises(ConfigError):
        nemo.get_rope_config(SimpleNamespace())
