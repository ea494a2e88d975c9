import pytest
import torch
from transformers import LlamaConfig, PhiConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi.modeling_phi import PhiRotaryEmbedding

from automodel_fn import ConfigError, RopeConfig, rope_config, rope_tables

HEAD_DIM, LONGEST, TRAINED = 16, 32, 8
SHRUNKEN = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": LONGEST}
TRAINED_ON = {"original_max_position_embeddings": TRAINED}
FACTORS = {
    "short_factor": [1 + step / 8 for step in range(8)],
    "long_factor": [2.0 + step for step in range(8)],
}
KINDS = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, **TRAINED_ON},
    "yarn with mscale": {"factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.5, **TRAINED_ON},
    "yarn with its own attention factor": {"factor": 4.0, "attention_factor": 1.5, **TRAINED_ON},
    "yarn not truncated": {"factor": 4.0, "truncate": False, "beta_fast": 16.0, **TRAINED_ON},
    "longrope": {"factor": 4.0, **FACTORS, **TRAINED_ON},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **TRAINED_ON},
}


def made(config_class, kind, **more):
    parameters = {"rope_type": kind.split()[0], "rope_theta": 1e4, **KINDS[kind], **more}
    return config_class(**SHRUNKEN, pad_token_id=0, rope_parameters=parameters)


def tables_of(config, num_positions, **options):
    return rope_tables(
        rope_config(config), HEAD_DIM, num_positions, max_position_embeddings=LONGEST, **options
    )


@pytest.mark.parametrize("length", [1, TRAINED, TRAINED + 1, LONGEST, LONGEST + 1, 100])
@pytest.mark.parametrize("kind", KINDS)
def test_tables_have_the_bits_of_the_rotary_module_of_llama(kind, length):
    config = made(LlamaConfig, kind)
    module = LlamaRotaryEmbedding(config)
    cos, sin = module(torch.zeros(1), torch.arange(length)[None])
    found = tables_of(config, length)

    assert found.cos.dtype == torch.float32
    assert torch.equal(torch.cat([found.cos, found.cos], -1), cos[0])
    assert torch.equal(torch.cat([found.sin, found.sin], -1), sin[0])


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_a_part_of_a_head_has_the_bits_of_the_rotary_module_of_phi(kind):
    config = made(PhiConfig, kind, partial_rotary_factor=0.5)
    cos, sin = PhiRotaryEmbedding(config)(torch.zeros(1), torch.arange(9)[None])
    found = tables_of(config, 9)

    assert found.rotary_dim == HEAD_DIM // 2
    assert torch.equal(torch.cat([found.cos, found.cos], -1), cos[0])
    assert torch.equal(torch.cat([found.sin, found.sin], -1), sin[0])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_the_length_of_the_sequence_chooses_the_frequencies_and_the_past_does_not(kind):
    config = made(LlamaConfig, kind)
    short, long = tables_of(config, 5), tables_of(config, 5, seq_len=100)

    assert not torch.equal(short.sin, long.sin)
    assert torch.equal(long.sin, tables_of(config, 100).sin[:5])
    assert torch.equal(short.sin, tables_of(config, 100, seq_len=5).sin[:5])


@pytest.mark.parametrize("kind", ["default", "linear", "yarn", "llama3"])
def test_other_frequencies_do_not_depend_on_the_length(kind):
    config = made(LlamaConfig, kind)

    assert torch.equal(tables_of(config, 5).cos, tables_of(config, 5, seq_len=100).cos)


def test_the_attention_factor_is_in_both_tables():
    found = tables_of(made(LlamaConfig, "yarn with its own attention factor"), 9)

    torch.testing.assert_close(found.cos**2 + found.sin**2, torch.full((9, 8), 1.5**2))


def test_a_ratio_stands_in_for_a_factor_that_is_left_out():
    stated = {"rope_type": "yarn", "rope_theta": 1e4, **TRAINED_ON}
    config = RopeConfig(1e4, rope_type="yarn", parameters=stated)
    found = rope_tables(config, HEAD_DIM, 9, max_position_embeddings=4 * TRAINED)

    assert torch.equal(found.cos, tables_of(made(LlamaConfig, "yarn"), 9).cos)


def test_tables_are_where_they_are_asked_for():
    assert rope_tables(RopeConfig(1e4), 4, 3, device="meta").cos.device.type == "meta"
    with torch.device("meta"):
        assert rope_tables(RopeConfig(1e4), 4, 3).sin.device.type == "meta"
    assert rope_tables(RopeConfig(1e4), 4, 0).cos.shape == (0, 2)


def scaled(kind, **parameters):
    return RopeConfig(1e4, rope_type=kind, parameters=parameters)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (RopeConfig(None), "have no rotary embedding"),
        (RopeConfig(1e4, partial_rotary_factor=0.2), "make 3 values to turn"),
        (RopeConfig(1e4, partial_rotary_factor=2.0), "make 32 values to turn"),
        (
            scaled("spiral"),
            "rope_type='spiral' is none that transformers knows: 'default', 'linear'",
        ),
        (scaled("linear"), "rope_type='linear' needs 'factor'"),
        (scaled("dynamic", factor=2.0), "max_position_embeddings=None: rope_type='dynamic' needs"),
        (scaled("yarn", factor=2.0), "needs it (original_max_position_embeddings)"),
        (scaled("yarn", **TRAINED_ON), "needs it (factor)"),
        ({"full_attention": RopeConfig(1e4)}, "must be a RopeConfig"),
    ],
)
def test_what_no_tables_can_be_made_of_is_an_error(config, message):
    with pytest.raises(ConfigError) as caught:
        rope_tables(config, HEAD_DIM, 9)
    assert message in str(caught.value)


def test_sizes_that_are_none_are_an_error():
    with pytest.raises(
        ConfigError, match=r"head_dim=-2 .*\n.*num_positions=2\.5 .*\n.*seq_len=True"
    ):
        rope_tables(RopeConfig(1e4), -2, 2.5, seq_len=True)
