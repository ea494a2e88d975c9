from collections.abc import Mapping

import pytest
import transformers

from automodel_fn import ConfigError, rope_config

FLAT = (
    "ApertusConfig",
    "BambaConfig",
    "CohereConfig",
    "DeepseekV3Config",
    "Exaone4Config",
    "FalconConfig",
    "GPTNeoXConfig",
    "Gemma2Config",
    "Glm4Config",
    "Glm4MoeConfig",
    "GptOssConfig",
    "GraniteConfig",
    "LlamaConfig",
    "MistralConfig",
    "MixtralConfig",
    "NemotronConfig",
    "Olmo2Config",
    "Phi3Config",
    "PhiConfig",
    "Qwen2Config",
    "Qwen3Config",
    "Qwen3MoeConfig",
    "Qwen3NextConfig",
    "Starcoder2Config",
)
NESTED = ("Gemma3TextConfig", "Gemma3nTextConfig", "ModernBertConfig")
# Newer than the oldest transformers that is allowed.
PERHAPS = ("BeamConfig", "DeepseekV4Config", "Gemma4TextConfig", "LagunaConfig", "Olmo3Config")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}


def made(name, **options):
    if not hasattr(transformers, name):
        pytest.skip(f"this transformers has no {name}")
    return getattr(transformers, name)(**options)


def agrees(found, stated):
    rest = {key: value for key, value in stated.items() if key != "type"}
    return (
        dict(found.parameters) == rest
        and found.theta == stated["rope_theta"]
        and found.rope_type == stated["rope_type"]
        and found.partial_rotary_factor == stated.get("partial_rotary_factor", 1.0)
    )


@pytest.mark.parametrize("name", FLAT)
def test_one_rotary_embedding_is_read_as_the_config_states_it(name):
    config = made(name)
    assert agrees(rope_config(config), config.rope_parameters)


@pytest.mark.parametrize("name", NESTED + PERHAPS)
def test_rotary_embeddings_by_layer_type_are_read_as_the_config_states_them(name):
    config = made(name)
    found = rope_config(config)
    assert isinstance(found, Mapping)
    assert found.keys() == config.rope_parameters.keys()
    for kind, stated in config.rope_parameters.items():
        assert found[kind].theta is None if stated is None else agrees(found[kind], stated)


@pytest.mark.parametrize("name", ["LlamaConfig", "Qwen3Config", "DeepseekV3Config"])
def test_a_scaling_in_either_spelling_is_read_as_the_config_states_it(name):
    newer = made(name, rope_parameters={**YARN, "rope_theta": 5e5})
    older = made(name, rope_scaling=dict(YARN), rope_theta=5e5)
    for config in (newer, older):
        found = rope_config(config)
        assert agrees(found, config.rope_parameters)
        assert (found.theta, found.rope_type, found.parameters["factor"]) == (5e5, "yarn", 4.0)


@pytest.mark.parametrize("name", ["LlamaConfig", "Glm4Config", "GptOssConfig", "Gemma3TextConfig"])
def test_the_dict_of_a_config_says_what_the_config_says(name):
    config = made(name)
    assert rope_config(config.to_dict()) == rope_config(config)


def test_layers_that_are_switched_off_are_named():
    found = rope_config(made("SmolLM3Config", num_hidden_layers=8))
    assert (found.theta, found.layers_without) == (2e6, (3, 7))


def test_layer_types_that_are_switched_off_have_no_theta():
    found = rope_config(made("Llama4TextConfig", num_hidden_layers=8))
    assert {kind: config.theta for kind, config in found.items()} == {
        "chunked_attention": 5e5,
        "full_attention": None,
    }


def test_thetas_by_layer_are_read_by_layer_type():
    found = rope_config(made("MuseSparkTextConfig"))
    assert {kind: config.theta for kind, config in found.items()} == {
        "sliding_attention": 5e5,
        "full_attention": None,
    }
    config = made("GraniteSWAConfig")
    assert agrees(rope_config(config), config.rope_parameters)


@pytest.mark.parametrize("name", ["BertConfig", "GPT2Config", "Gemma3Config"])
def test_a_config_without_rotary_embeddings_is_an_error(name):
    with pytest.raises(ConfigError, match="says nothing about rotary"):
        rope_config(made(name))
