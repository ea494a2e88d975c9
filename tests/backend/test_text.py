import json
import sys

import pytest
from hypothesis import given

from automodel_fn import BackendConfig, BackendUnavailableError, ConfigError, TEFp8Config
from automodel_fn.testing import backend_configs

FULL = BackendConfig(attn="te", te_fp8="block", gate_precision="fp32", rope_fusion=False)


@given(backend_configs())
def test_a_config_comes_back_from_every_kind_of_text(config):
    assert BackendConfig.from_dict(config.to_dict()) == config
    assert BackendConfig.from_json(config.to_json()) == config
    assert BackendConfig.from_yaml(config.to_yaml()) == config


def test_plain_data_has_words_for_everything():
    found = FULL.to_dict()

    assert (found["te_fp8"], found["gate_precision"], found["rope_fusion"]) == (
        "block",
        "float32",
        False,
    )
    assert json.loads(FULL.to_json()) == found


def test_a_file_has_to_name_what_is_not_the_default_only():
    assert BackendConfig.from_yaml("attn: sdpa\nte_fp8:\n  recipe: block\n") == BackendConfig(
        attn="sdpa", te_fp8="block"
    )
    assert BackendConfig.from_yaml("") == BackendConfig()
    assert BackendConfig.from_json("{}") == BackendConfig()


def test_unknown_keys_are_an_error_with_the_nearest_name():
    with pytest.raises(ConfigError) as caught:
        BackendConfig.from_yaml("rms-norm: torch\natn: sdpa\nzzz: 1\n")

    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert lines[1:4] == [
        "'rms-norm' is no field; did you mean 'rms_norm'?",
        "'atn' is no field; did you mean 'attn'?",
        "'zzz' is no field",
    ]
    assert lines[4].startswith("Fields: attn, linear, ")


def test_a_wrong_value_is_the_error_of_the_config():
    with pytest.raises(ConfigError, match="did you mean 'sdpa'"):
        BackendConfig.from_json('{"attn": "spda"}')


@pytest.mark.parametrize("text", ["[]", "3", '"attn"'])
def test_what_is_no_mapping_is_an_error(text):
    with pytest.raises(ConfigError, match="must be a mapping of fields"):
        BackendConfig.from_json(text)


def test_what_is_no_text_of_the_kind_is_an_error():
    with pytest.raises(ConfigError, match="no JSON"):
        BackendConfig.from_json("{")
    with pytest.raises(ConfigError, match="no YAML"):
        BackendConfig.from_yaml("attn: [")


def test_a_recipe_object_cannot_be_written():
    class Recipe:
        def mxfp8(self):
            return True

    with pytest.raises(ConfigError, match="te_fp8=Recipe is a recipe object"):
        BackendConfig(te_fp8=TEFp8Config(Recipe())).to_dict()


def test_without_yaml_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(BackendUnavailableError, match=r"pip install 'automodel_fn\[config\]'"):
        BackendConfig.from_yaml("attn: sdpa")


def test_data_needs_cattrs_and_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "cattrs", None)
    for asked in (
        lambda: BackendConfig.from_dict({}),
        lambda: BackendConfig.from_json("{}"),
        lambda: BackendConfig.from_yaml(""),
        BackendConfig().to_dict,
        BackendConfig().to_json,
    ):
        with pytest.raises(
            BackendUnavailableError, match=r"cattrs.*pip install 'automodel_fn\[config\]'"
        ):
            asked()


def lines_of(data):
    with pytest.raises(ConfigError) as caught:
        BackendConfig.from_dict(data)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def test_keys_and_values_that_are_wrong_are_said_at_once():
    lines = lines_of(
        {
            "atn": "spda",
            "linear": True,
            7: 1,
            "te_fp8": {"recip": "blok"},
            "experts": "torch",
            "dispatcher": "deepep",
        }
    )

    assert [line.partition(" must be")[0] for line in lines[:-1]] == [
        "'atn' is no field; did you mean 'attn'?",
        "7 is no field",
        "te_fp8: 'recip' is no field; did you mean 'recipe'?",
        "attn='spda'",
        "linear=True",
        "te_fp8={'recipe': 'blok'} is no FP8 config: recipe='blok'",
        "experts='torch', dispatcher='deepep': experts='torch' needs dispatcher='torch'; set it, "
        "or experts='torch_mm'",
    ]
    assert lines[-1].startswith("Fields: attn, ")


def test_a_misspelt_key_is_not_missed_by_what_needs_it():
    lines = lines_of({"fake_balanced_gat": True, "fake_gate_noise": 0.5})

    assert lines[0] == "'fake_balanced_gat' is no field; did you mean 'fake_balanced_gate'?"
    assert [line for line in lines[1:] if not line.startswith("Fields: ")] == []


def test_a_key_that_is_right_stands_over_one_that_is_only_near():
    lines = lines_of({"attn": "sdpa", "atn": "spda"})

    assert len(lines) == 2
    assert lines_of({"atn": "spda", "attn": "sdpa"}) == lines


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("compile_attn", "no"),
        ("compile_attn", 1),
        ("dispatcher_num_sms", "20"),
        ("dispatcher_num_sms", 20.0),
        ("fake_gate_noise", "0"),
        ("enable_deepep", ""),
        ("rope_fusion", 1),
        ("lm_head_precision", ["fp32"]),
        ("te_fp8", False),
        ("attn", None),
    ],
)
def test_data_is_not_bent_into_the_type_of_its_field(name, value):
    (line,) = lines_of({name: value})
    assert line.startswith(f"{name}={value!r} ")
