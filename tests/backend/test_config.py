import attrs
import pytest
import torch

from automodel_fn import AutomodelFnError, BackendConfig, ConfigError, TEFp8Config
from automodel_fn.backend._checks import complaint
from automodel_fn.backend._config import values_of
from automodel_fn.backend._rules import CHOICES, PREFERRED, RULES, completions

FIELDS = [field.name for field in attrs.fields(BackendConfig)]
BOOLS = [
    "dispatcher_share_token_dispatcher",
    "dispatcher_async_dispatch",
    "fake_balanced_gate",
    "enable_hf_state_dict_adapter",
    "enable_fsdp_optimizations",
    "compile_attn",
]


def refused(**fields):
    with pytest.raises(ConfigError) as caught:
        BackendConfig(**fields)
    head, *lines = str(caught.value).splitlines()
    assert head == "this BackendConfig cannot be made"
    return [line.strip() for line in lines]


def test_the_defaults_leave_what_depends_on_the_machine_open():
    config = BackendConfig()
    open_fields = {name for name, value in values_of(config).items() if value == "auto"}
    assert open_fields == {
        "attn",
        "linear",
        "rope_fusion",
        "async_masks",
        "swiglu",
        "loss",
        "experts",
        "dispatcher",
    }
    assert open_fields == set(PREFERRED)
    assert config.rms_norm == "torch_fp32"
    assert config.dispatcher_num_sms == 20
    assert config.dispatcher_share_token_dispatcher is True
    assert config.dispatcher_async_dispatch is False
    assert config.enable_hf_state_dict_adapter is True
    assert config.enable_fsdp_optimizations is False
    assert (config.te_fp8, config.gate_precision, config.enable_deepep) == (None, None, None)
    assert (config.fake_balanced_gate, config.fake_gate_noise) == (False, 0.0)
    assert config.compile_attn is False


def test_a_config_is_a_value():
    assert BackendConfig() == BackendConfig()
    assert BackendConfig(attn="te") != BackendConfig(attn="sdpa")
    configs = [BackendConfig(), BackendConfig(), BackendConfig(te_fp8="block")]
    assert len(set(configs)) == 2
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        BackendConfig().attn = "te"
    with pytest.raises(TypeError):
        BackendConfig("te")
    with pytest.raises(TypeError, match="atn"):
        BackendConfig(atn="te")


def test_evolve_gives_a_changed_copy_and_checks_it():
    config = BackendConfig(attn="sdpa", gate_precision="fp32", te_fp8="block")
    other = attrs.evolve(config, attn="te")
    assert (config.attn, other.attn) == ("sdpa", "te")
    assert (other.gate_precision, other.te_fp8) == (torch.float32, TEFp8Config("block"))
    with pytest.raises(ConfigError):
        attrs.evolve(config, attn="spda")


@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_can_be_made_alone(name):
    for value in CHOICES[name]:
        assert getattr(BackendConfig(**{name: value}), name) == value


@pytest.mark.parametrize(
    ("name", "value", "meant"),
    [
        ("attn", "spda", "sdpa"),
        ("attn", "SDPA", "sdpa"),
        ("linear", "torhc", "torch"),
        ("rms_norm", "torch_fp16", "torch_fp32"),
        ("experts", "torch-mm", "torch_mm"),
        ("dispatcher", "deep_ep", "deepep"),
    ],
)
def test_a_wrong_spelling_is_an_error_that_names_the_nearest(name, value, meant):
    (line,) = refused(**{name: value})
    allowed = ", ".join(map(repr, CHOICES[name]))
    assert line == f"{name}={value!r} must be one of {allowed}; did you mean {meant!r}?"


def test_what_is_near_to_nothing_has_no_hint():
    (line,) = refused(attn="quack")
    assert line.endswith("'eager', 'tilelang'")


@pytest.mark.parametrize("value", [None, True, 1, ["te"], b"te", object])
@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_a_str(name, value):
    (line,) = refused(**{name: value})
    assert line.startswith(f"{name}={value!r} must be one of ")


@pytest.mark.parametrize("value", [1, 0, "True", None, 1.0])
@pytest.mark.parametrize("name", BOOLS)
def test_a_number_is_no_bool(name, value):
    assert refused(**{name: value}) == [f"{name}={value!r} must be True or False"]


@pytest.mark.parametrize("value", [1, 0, None, "yes"])
@pytest.mark.parametrize("name", ["rope_fusion", "async_masks"])
def test_a_switch_is_a_bool_or_auto(name, value):
    assert refused(**{name: value}) == [f"{name}={value!r} must be True, False or 'auto'"]


@pytest.mark.parametrize("value", [0, -1, True, 2.0, "20", None])
def test_a_number_of_multiprocessors_is_a_whole_one(value):
    (line,) = refused(dispatcher_num_sms=value)
    assert line == f"dispatcher_num_sms={value!r} must be a whole number of at least 1"


@pytest.mark.parametrize("value", [-0.1, 1.1, 2, 10**400, float("nan"), True, "0.5", None])
def test_noise_is_a_number_from_0_to_1(value):
    lines = refused(fake_balanced_gate=True, fake_gate_noise=value)
    assert lines == [f"fake_gate_noise={value!r} must be a number from 0 to 1"]


@pytest.mark.parametrize("value", [0, 1, 0.5])
def test_noise_is_stored_as_a_float(value):
    stored = BackendConfig(fake_balanced_gate=True, fake_gate_noise=value).fake_gate_noise
    assert isinstance(stored, float)
    assert stored == value


def test_noise_needs_the_gate_that_adds_it():
    (line,) = refused(fake_gate_noise=0.5)
    assert line.startswith("fake_gate_noise=0.5, fake_balanced_gate=False: ")
    assert "set fake_balanced_gate=True" in line


@pytest.mark.parametrize(
    ("value", "instead"),
    [
        (True, "say dispatcher='deepep' and experts='torch_mm' (or 'gmm')"),
        (False, "say dispatcher='torch'"),
        ("yes", "say which dispatcher and which experts"),
    ],
)
def test_enable_deepep_is_gone_and_the_error_says_what_replaced_it(value, instead):
    (line,) = refused(enable_deepep=value)
    assert line.startswith(f"enable_deepep={value!r} is no longer a choice")
    assert line.endswith(instead)


@pytest.mark.parametrize("value", ["fp32", "float32", "torch.float32", torch.float32])
def test_gate_precision_is_stored_as_a_dtype(value):
    assert BackendConfig(gate_precision=value).gate_precision is torch.float32


@pytest.mark.parametrize("value", ["int8", torch.complex64, torch.float8_e4m3fn, "single", 32])
def test_gate_precision_is_a_floating_dtype_of_16_bits_at_least(value):
    (line,) = refused(gate_precision=value)
    assert line.endswith("must be None or one of float16, bfloat16, float32, float64")


@pytest.mark.parametrize("value", ["block", {"recipe": "block"}, TEFp8Config("block")])
def test_fp8_can_be_given_in_three_ways(value):
    assert BackendConfig(te_fp8=value).te_fp8 == TEFp8Config("block")


def test_fp8_from_an_empty_mapping_has_the_default_recipe():
    assert BackendConfig(te_fp8={}).te_fp8 == TEFp8Config()


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("blok", "Did you mean 'block'?"),
        ({"recipe": "blok"}, "Did you mean 'block'?"),
        ({"recip": "block"}, "unexpected keyword argument 'recip'"),
        ({1: 2}, "keywords must be strings"),
        (True, "expected a TEFp8Config, the name of a recipe, a mapping, or None"),
    ],
)
def test_what_is_no_fp8_config_is_an_error_that_says_why(value, said):
    (line,) = refused(te_fp8=value)
    assert line.startswith(f"te_fp8={value!r} is no FP8 config: ")
    assert said in line


def test_all_that_is_wrong_is_said_at_once():
    lines = refused(
        attn="spda",
        linear=True,
        rope_fusion=1,
        dispatcher_num_sms=0,
        enable_deepep=True,
        te_fp8="blok",
        gate_precision="int8",
        fake_gate_noise=0.5,
        experts="torch",
        dispatcher="deepep",
    )
    said = [line.partition("=")[0] for line in lines]
    assert said == [
        "attn",
        "linear",
        "rope_fusion",
        "dispatcher_num_sms",
        "enable_deepep",
        "te_fp8",
        "gate_precision",
        "fake_gate_noise",
        "experts",
    ]


def test_a_wrong_value_is_not_also_blamed_for_not_fitting():
    (line,) = refused(experts="te", dispatcher="toch")
    assert line.startswith("dispatcher='toch' must be one of")


def test_a_config_error_is_also_a_value_error():
    with pytest.raises(ValueError, match="attn='x'") as caught:
        BackendConfig(attn="x")
    assert isinstance(caught.value, AutomodelFnError)


@pytest.mark.parametrize(
    ("fields", "blamed"),
    [
        ({"experts": "torch", "dispatcher": "deepep"}, ["experts='torch', dispatcher='deepep'"]),
        (
            {"te_fp8": "current", "linear": "torch", "experts": "torch_mm"},
            ["te_fp8='current', linear='torch', experts='torch_mm'"],
        ),
        ({"compile_attn": True, "attn": "te"}, ["compile_attn=True, attn='te'"]),
        ({"compile_attn": True, "attn": "tilelang"}, ["compile_attn=True, attn='tilelang'"]),
        ({"compile_attn": True, "linear": "te"}, ["compile_attn=True, linear='te'"]),
        ({"compile_attn": True, "rms_norm": "te"}, ["compile_attn=True, rms_norm='te'"]),
        (
            {"compile_attn": True, "attn": "te", "rms_norm": "te"},
            ["compile_attn=True, attn='te'", "compile_attn=True, rms_norm='te'"],
        ),
    ],
)
def test_what_no_machine_could_bring_together_is_an_error_of_the_config(fields, blamed):
    assert [line.partition(": ")[0] for line in refused(**fields)] == blamed


@pytest.mark.parametrize(
    "fields",
    [
        {"te_fp8": "current", "linear": "torch", "experts": "gmm"},
        {"te_fp8": "current", "compile_attn": True, "experts": "gmm"},
    ],
)
def test_auto_cannot_hide_a_contradiction_and_every_way_out_is_told(fields):
    text = "\n".join(refused(**fields))
    assert "set linear='te' or experts='te', or te_fp8=None" in text
    assert ("compile_attn=True, linear='auto'" in text) == ("compile_attn" in fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"experts": "te"},
        {"experts": "te", "dispatcher": "torch"},
        {"experts": "gmm", "dispatcher": "torch"},
        {"te_fp8": "current", "linear": "torch", "dispatcher": "torch"},
        {"te_fp8": "current"},
        {"te_fp8": "current", "linear": "torch"},
        {"te_fp8": "current", "experts": "torch_mm"},
        {"te_fp8": "current", "compile_attn": True},
        {"compile_attn": True},
        {"compile_attn": True, "attn": "flex", "rms_norm": "torch"},
        {"experts": "torch_mm", "dispatcher": "deepep"},
        {"fake_balanced_gate": True, "fake_gate_noise": 1.0},
    ],
)
def test_what_some_machine_could_bring_together_is_left_open(fields):
    config = BackendConfig(**fields)
    assert {name: getattr(config, name) for name in fields if name != "te_fp8"} == {
        name: value for name, value in fields.items() if name != "te_fp8"
    }


def test_a_config_can_be_made_exactly_if_some_choice_for_auto_breaks_no_rule():
    options = {
        "linear": ("auto", "torch", "te"),
        "experts": ("auto", "torch", "te", "torch_mm"),
        "dispatcher": ("auto", "torch", "deepep"),
        "te_fp8": (None, TEFp8Config()),
        "compile_attn": (True, False),
    }
    fields = [{}]
    for name, values in options.items():
        fields = [{**each, name: value} for each in fields for value in values]
    made = 0
    for each in fields:
        values = {**values_of(BackendConfig()), **each}
        could = any(all(rule.holds(v) for rule in RULES) for v in completions(values))
        try:
            BackendConfig(**each)
        except ConfigError:
            assert not could, each
        else:
            assert could, each
            made += 1
    assert 0 < made < len(fields)


def test_every_field_has_a_check():
    for name, value in values_of(BackendConfig()).items():
        assert complaint(name, value) == ""
        assert complaint(name, object()) != ""


@pytest.mark.parametrize("value", [None, "fp32", "bf16x3", "bf16"])
def test_a_head_has_a_precision_or_none_and_it_survives_json(value):
    config = BackendConfig(lm_head_precision=value)

    assert BackendConfig.from_json(config.to_json()) == config
    assert BackendConfig().lm_head_precision is None


def test_another_precision_of_the_head_is_refused_with_the_nearest():
    (line,) = refused(lm_head_precision="bf16x2")

    assert line.strip() == (
        "lm_head_precision='bf16x2' must be None or one of 'fp32', 'bf16x3', 'bf16'; "
        "did you mean 'bf16x3'?"
    )
