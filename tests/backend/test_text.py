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
