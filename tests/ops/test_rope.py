import copy
import pickle
from types import MappingProxyType, SimpleNamespace

import attrs
import pytest

from automodel_fn import ConfigError, RopeConfig, rope_config

FULL, SLIDING = "full_attention", "sliding_attention"


def read(**config):
    found = rope_config(config)
    assert rope_config(SimpleNamespace(**config)) == found
    return found


def thetas(found):
    return {kind: config.theta for kind, config in found.items()}


def test_flat_parameters_are_read_as_they_stand():
    found = read(
        rope_parameters={
            "rope_theta": 500000,
            "rope_type": "llama3",
            "factor": 8.0,
            "partial_rotary_factor": 0.5,
        }
    )
    assert (found.theta, found.rope_type, found.partial_rotary_factor) == (5e5, "llama3", 0.5)
    assert isinstance(found.theta, float)
    assert found.parameters["factor"] == 8.0


@pytest.mark.parametrize("scaling", [None, {}])
def test_a_theta_alone_is_a_plain_rotary_embedding(scaling):
    expected = RopeConfig(1e4, parameters={"rope_type": "default", "rope_theta": 1e4})
    assert read(rope_theta=1e4, rope_scaling=scaling) == expected
    assert read(rope_theta=1e4, rope_parameters=None) == expected


@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_older_attributes_say_the_same_as_parameters(name):
    older = read(
        rope_theta=1e4,
        rope_scaling={name: "linear", "factor": 2.0},
        partial_rotary_factor=0.25,
    )
    newer = read(
        rope_parameters={
            "rope_theta": 1e4,
            "rope_type": "linear",
            "factor": 2.0,
            "partial_rotary_factor": 0.25,
        }
    )
    assert older == newer
    assert hash(older) == hash(newer)


def test_parameters_win_over_older_attributes():
    found = read(
        rope_parameters={"rope_theta": 1.0, "rope_type": "yarn", "type": "linear"},
        rope_theta=2.0,
        rope_scaling={"type": "dynamic"},
        partial_rotary_factor=0.5,
    )
    assert (found.theta, found.rope_type, found.partial_rotary_factor) == (1.0, "yarn", 0.5)


def test_a_theta_that_is_left_out_is_that_of_the_config_or_of_its_class():
    class Config:
        default_theta = 7.0
        rope_parameters = MappingProxyType({"rope_type": "linear", "factor": 2.0})

    assert rope_config(Config).theta == 7.0
    assert rope_config(Config()).theta == 7.0
    assert read(rope_parameters={"factor": 2.0}, rope_theta=3.0, default_theta=7.0).theta == 3.0
    assert read(rope_scaling={"type": "linear", "factor": 2.0}, default_theta=7.0).theta == 7.0


@pytest.mark.parametrize("default", [{"global": 9.0, "local": 5.0}, {FULL: 9.0, SLIDING: 5.0}])
def test_a_default_may_differ_by_layer_type(default):
    found = read(rope_parameters={FULL: {}, SLIDING: {}}, default_theta=default)
    assert thetas(found) == {FULL: 9.0, SLIDING: 5.0}


def test_nested_parameters_give_a_read_only_mapping_of_layer_types():
    found = read(
        rope_parameters={
            FULL: {"rope_theta": 1e6, "rope_type": "yarn", "factor": 4.0},
            SLIDING: {"rope_theta": 1e4},
        }
    )
    assert isinstance(found, MappingProxyType)
    assert thetas(found) == {FULL: 1e6, SLIDING: 1e4}
    assert [config.rope_type for config in found.values()] == ["yarn", "default"]


def test_scalars_beside_nested_dicts_hold_for_all_of_them():
    found = read(
        rope_parameters={
            "rope_theta": 1e6,
            "rope_type": "linear",
            "factor": 2.0,
            FULL: {"factor": 8.0},
            SLIDING: {"rope_theta": 1e4, "type": "default", "partial_rotary_factor": 0.5},
        },
        rope_theta=3.0,
    )
    assert thetas(found) == {FULL: 1e6, SLIDING: 1e4}
    assert [config.rope_type for config in found.values()] == ["linear", "default"]
    assert [config.parameters["factor"] for config in found.values()] == [8.0, 2.0]
    assert [config.partial_rotary_factor for config in found.values()] == [1.0, 0.5]


@pytest.mark.parametrize("types", [None, [SLIDING, FULL]])
def test_an_entry_of_none_has_no_rotary_embedding(types):
    found = read(
        rope_parameters={"rope_theta": 1e4, "factor": None, SLIDING: {}, FULL: None},
        layer_types=types,
    )
    assert found[FULL] == RopeConfig(None)
    assert thetas(found) == {SLIDING: 1e4, FULL: None}


def test_a_flat_parameter_of_none_is_no_layer_type():
    found = read(rope_parameters={"rope_theta": 1e4, "mscale": None}, layer_types=[FULL])
    assert dict(found.parameters) == {"rope_type": "default", "rope_theta": 1e4, "mscale": None}


def test_labels_of_a_config_come_before_its_layer_types():
    found = read(
        rope_parameters={"main": {"rope_theta": 1.0}, "compress": None},
        _rope_type_labels=("main", "compress"),
        layer_types=["a", "b"],
    )
    assert thetas(found) == {"main": 1.0, "compress": None}


def test_older_names_of_single_models_are_known():
    assert read(rotary_emb_base=10, rotary_pct=0.25, rope_scaling=None) == RopeConfig(
        10.0,
        partial_rotary_factor=0.25,
        parameters={"rope_type": "default", "rope_theta": 10.0, "partial_rotary_factor": 0.25},
    )
    scaling = {"rope_type": "linear", "factor": 8.0}
    gemma = read(rope_theta=1e6, rope_local_base_freq=1e4, rope_scaling=scaling)
    assert thetas(gemma) == {FULL: 1e6, SLIDING: 1e4}
    assert [config.rope_type for config in gemma.values()] == ["linear", "default"]
    bert = read(global_rope_theta=1e6, local_rope_theta=1e4, rope_scaling=scaling)
    assert thetas(bert) == {FULL: 1e6, SLIDING: 1e4}
    assert [config.rope_type for config in bert.values()] == ["linear", "linear"]


FLAT = {"rope_theta": 1e4, "rope_type": "default"}


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({"layer_rope_theta": [5.0, 5.0, 5.0]}, (5.0, ())),
        ({"layer_rope_theta": [5.0, 0, 5]}, (5.0, (1,))),
        ({"no_rope_layers": [1, 0, 1]}, (1e4, (1,))),
        ({"no_rope_layers": [True, False, False, True]}, (1e4, (1, 2))),
        ({"no_rope_layers": [0, 0]}, (None, ())),
        ({"no_rope_layers": []}, (1e4, ())),
        ({"no_rope_layers": None, "layer_rope_theta": None}, (1e4, ())),
        ({"no_rope_layers": [1, 0, 1], "layer_types": [FULL] * 3}, (1e4, (1,))),
        ({"layer_rope_theta": [5.0] * 4, "layer_types": [FULL, SLIDING] * 2}, (5.0, ())),
    ],
)
def test_switches_by_layer_of_one_kind_name_the_layers_without(switches, expected):
    found = read(rope_parameters=FLAT, **switches)
    assert (found.theta, found.layers_without) == expected
    if found.theta is not None:
        assert found.parameters["rope_theta"] == found.theta


@pytest.mark.parametrize(
    ("switches", "expected"),
    [
        ({"layer_rope_theta": [5.0, 0, 5.0, 0]}, {SLIDING: (5.0, ()), FULL: (None, ())}),
        ({"layer_rope_theta": [5.0, 7.0, 5.0, 7.0]}, {SLIDING: (5.0, ()), FULL: (7.0, ())}),
        ({"no_rope_layers": [1, 0, 1, 0, 1, 1]}, {SLIDING: (1e4, ()), FULL: (None, ())}),
        ({"no_rope_layers": [1, 1, 1, 0]}, {SLIDING: (1e4, ()), FULL: (1e4, (3,))}),
    ],
)
def test_switches_by_layer_are_sorted_by_layer_type(switches, expected):
    found = read(rope_parameters=FLAT, layer_types=[SLIDING, FULL] * 2, **switches)
    assert {kind: (c.theta, c.layers_without) for kind, c in found.items()} == expected


def test_switches_by_layer_go_with_nested_parameters():
    found = read(
        rope_parameters={FULL: {"rope_theta": 1.0}, SLIDING: {"rope_theta": 2.0}},
        layer_types=[SLIDING, FULL, "linear_attention", FULL],
        no_rope_layers=[0, 1, 1, 0],
    )
    assert {kind: (c.theta, c.layers_without) for kind, c in found.items()} == {
        FULL: (1.0, (3,)),
        SLIDING: (None, ()),
    }


@pytest.mark.parametrize(
    ("switches", "message"),
    [
        ({"layer_rope_theta": [1.0, 2.0, 1.0]}, r"all layers have the thetas \[1\.0, 2\.0\]"),
        (
            {"layer_rope_theta": [1.0, 2.0], "layer_types": [FULL, FULL]},
            "full_attention layers have the thetas",
        ),
        ({"layer_rope_theta": [1.0], "layer_types": [FULL, FULL]}, "1 entries for 2 layers"),
        ({"layer_rope_theta": [1.0, -1.0]}, "layer 1 has -1.0"),
        ({"layer_rope_theta": ["x", 1.0]}, "layer 0 has 'x'"),
        ({"no_rope_layers": [1, None]}, "layer 1 has None"),
    ],
)
def test_switches_that_go_by_no_layer_type_are_errors(switches, message):
    with pytest.raises(ConfigError, match=message):
        rope_config({"rope_parameters": FLAT, **switches})


@pytest.mark.parametrize(
    "config",
    [{}, {"rope_parameters": None}, {"rope_parameters": {}}, {"partial_rotary_factor": 0.5}],
)
def test_a_config_without_rotary_embeddings_is_an_error(config):
    for form in (config, SimpleNamespace(**config, default_theta=1e4)):
        with pytest.raises(ConfigError, match="says nothing about rotary"):
            rope_config(form)


def test_of_a_composite_config_the_error_names_the_part():
    with pytest.raises(ConfigError, match=r"config\.text_config"):
        rope_config({"text_config": {"rope_theta": 1.0}})


@pytest.mark.parametrize("theta", [0, -1.0, float("nan"), float("inf"), "10000", True])
def test_a_theta_that_is_no_positive_number_is_an_error(theta):
    with pytest.raises(ConfigError, match="theta="):
        rope_config({"rope_parameters": {"rope_theta": theta}})
    with pytest.raises(ConfigError, match="theta="):
        RopeConfig(theta)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "linear"}, "rope_theta is nowhere given"),
        ({"rope_theta": 1.0, "rope_type": 3}, "rope_type=3"),
        ({"rope_theta": 1.0, "partial_rotary_factor": 0}, "partial_rotary_factor=0"),
        ({FULL: {"rope_theta": 1.0}, SLIDING: 1e4}, f"{SLIDING}: 10000.0"),
        ([1e4], r"rope_parameters=\[10000\.0\] must be a dict"),
    ],
)
def test_what_no_rotary_embedding_can_be_made_of_is_an_error(parameters, message):
    config = {"rope_parameters": parameters, "layer_types": [FULL, SLIDING]}
    with pytest.raises(ConfigError, match=message):
        rope_config(config)


def test_all_layer_types_that_are_wrong_are_said_at_once():
    wrong = {FULL: {"rope_theta": -1.0}, SLIDING: {"rope_theta": 1.0, "rope_type": 0.5}}
    with pytest.raises(ConfigError) as caught:
        rope_config({"rope_parameters": wrong})
    assert f"{FULL}: theta=-1.0" in str(caught.value)
    assert f"{SLIDING}: rope_type=0.5" in str(caught.value)


def test_a_rope_config_is_a_value_that_later_changes_do_not_reach():
    lists = [1.0, 2.0]
    config = {"rope_parameters": {"rope_theta": 1.0, "short_factor": lists}}
    given = copy.deepcopy(config)
    found = rope_config(config)
    assert config == given
    lists.append(3.0)
    config["rope_parameters"]["rope_theta"] = 2.0
    assert found.parameters["short_factor"] == (1.0, 2.0)
    with pytest.raises(TypeError):
        found.parameters["rope_theta"] = 2.0
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        found.theta = 2.0


@pytest.mark.parametrize(
    "again", [copy.copy, copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))]
)
def test_a_rope_config_can_be_copied_and_pickled(again):
    found = read(rope_parameters={**FLAT, "short_factor": [1.0]}, no_rope_layers=[1, 0])
    assert again(found) == found
    assert hash(again(found)) == hash(found)


def test_a_dict_among_the_parameters_cannot_be_changed_and_can_be_copied():
    found = RopeConfig(1.0, parameters={"extra": {"a": [1]}})
    with pytest.raises(TypeError):
        found.parameters["extra"]["a"] = 2
    assert copy.deepcopy(found) == found


def test_the_parameters_count_for_equality_only():
    left, right = RopeConfig(1.0, parameters={"factor": 1.0}), RopeConfig(1.0)
    assert left != right
    assert hash(left) == hash(right)
