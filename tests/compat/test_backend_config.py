import copy
import dataclasses
import pickle
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from automodel_fn import ConfigError
from automodel_fn.compat import nemo

# The first values are valid; what follows None in a list is of the wrong kind or value.
FLAGS = [True, False, None, "yes"]
SIZES = [20, None, -3, "many"]
VALUES = {
    "attn": ["te", "sdpa", "flex", "magi", None, "bogus", 3],
    "sparse_attn": ["generic", "msa", None, "bogus"],
    "linear": ["te", "torch", "quack", None, "bogus"],
    "rms_norm": ["torch", "torch_fp32", "te", "quack", None, "bogus"],
    "rope": ["torch", "quack", "triton", None, "bogus"],
    "rope_fusion": FLAGS,
    "experts": ["torch", "te", "gmm", "torch_mm", "torch_mm_mxfp8", None, "bogus"],
    "dispatcher": ["torch", "deepep", "hybridep", "uccl_ep", "mok", None, "bogus"],
    "te_grouped_tensor": FLAGS,
    "dispatcher_num_sms": SIZES,
    "dispatcher_share_token_dispatcher": FLAGS,
    "dispatcher_async_dispatch": FLAGS,
    "mok": [
        {},
        {"precision": "mxfp8", "minibatch_size": 512},
        {"precision": "fp4"},
        {"fwd_num_comm_sms": 3},
        {"bwd_num_comm_sms": True},
        {"minibatch_size": 0},
        {"minibatch_size": "256"},
        {"macrobatch_size": 5000},
        {"schedule_capacity_multiplier": float("inf")},
        {"schedule_capacity_multiplier": 0},
        {"schedule_capacity_multiplier": 1},
        {"all_gather_top_experts_chunk_bytes": 24},
        {"unknown": 1},
        None,
        "mxfp8",
    ],
    "dispatcher_hybridep_permute_fusion": FLAGS,
    "dispatcher_hybridep_compact_routing": FLAGS,
    "dispatcher_hybridep_num_sms_preprocessing": SIZES,
    "dispatcher_hybridep_num_blocks_permute": SIZES,
    "dispatcher_hybridep_num_blocks_unpermute": SIZES,
    "enable_deepep": FLAGS,
    "fake_balanced_gate": FLAGS,
    "fake_gate_noise": [0.0, 0.5, None, 5.0, "loud"],
    "enable_hf_state_dict_adapter": FLAGS,
    "enable_fsdp_optimizations": FLAGS,
    "te_fp8": [
        {},
        {"recipe": "block"},
        {"recipe": "bogus"},
        {"recipe": SimpleNamespace(fp8_dpa=True)},
        {"recipe": SimpleNamespace(fp8_dpa=None)},
        {"unknown": 1},
        None,
        "block",
        False,
    ],
    "gate_precision": [torch.float32, "float32", "torch.BFloat16", "bf16", "Half", None, 7],
    "compile_attn": FLAGS,
    "compile_situ": FLAGS,
    "compile_norm": FLAGS,
    "shared_expert_overlap": FLAGS,
    "compile_router_weight": FLAGS,
    "benchmark_static_routing": FLAGS,
    "cuda_graph": [
        {},
        {"modules": []},
        {"modules": ["attn"]},
        {"modules": ["te_dpa"]},
        {"modules": ["moe_router"]},
        {"modules": ["moe_router", "moe_preprocess"]},
        {"modules": ["moe_preprocess"]},
        {"modules": ["attn", "te_dpa"]},
        {"modules": ["attn", "attn"]},
        {"modules": ["bogus"]},
        {"modules": [1]},
        {"modules": ("attn",)},
        {"unknown": 1},
        None,
        "attn",
    ],
}


def are_valid(values):
    return values[: values.index(None)] if None in values else values


valid = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from(are_valid(values)) for name, values in VALUES.items()}
)
any_values = st.fixed_dictionaries(
    {}, optional={name: st.sampled_from(values) for name, values in VALUES.items()}
)
# One wrong value hides all that are checked later, so most have few fields.
few = st.lists(st.sampled_from(sorted(VALUES)), max_size=5, unique=True).flatmap(
    lambda names: st.fixed_dictionaries({name: st.sampled_from(VALUES[name]) for name in names})
)


# The fields have more combinations than a profile has examples.
many_examples = settings(max_examples=max(400, settings().max_examples))


def fields(config):
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        is_part = dataclasses.is_dataclass(value)
        found[field.name] = (type(value).__name__, vars(value)) if is_part else value
    return found


@pytest.fixture(scope="session")
def both(original, outcome):
    def made(arguments):
        ends = []
        for module in (nemo, original):
            given = copy.copy(arguments)
            ends.append(outcome(module, lambda u, given=given: u.BackendConfig(**given)))
        return ends

    return made


def demand_equal(both, arguments):
    ours, theirs = both(arguments)
    if theirs.error == "AttributeError":
        # A te_fp8 that is none is asked for its recipe; ours has none to ask.
        assert ours.error in (None, "ValueError")
        return
    assert ours == theirs, (ours.message, theirs.message)
    if ours.error is None:
        assert fields(ours.value) == fields(theirs.value)
        assert repr(ours.value) == repr(theirs.value)


def test_every_field_is_tried():
    assert list(VALUES) == [field.name for field in dataclasses.fields(nemo.BackendConfig)]


@many_examples
@given(few | valid | any_values)
def test_a_config_is_made_or_refused_as_by_the_original(both, arguments):
    demand_equal(both, arguments)


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in VALUES.items() for value in values]
)
def test_each_value_alone_is_taken_or_refused_as_by_the_original(both, name, value):
    demand_equal(both, {name: value})


@many_examples
@given(
    st.fixed_dictionaries(
        {name: st.sampled_from(VALUES[name]) for name in ("attn", "linear", "rms_norm")}
        | {name: st.sampled_from(VALUES[name]) for name in ("experts", "dispatcher")}
        | {name: st.sampled_from(VALUES[name]) for name in ("cuda_graph", "te_fp8")},
        optional={"te_grouped_tensor": st.booleans(), "fake_balanced_gate": st.booleans()},
    )
)
def test_backends_go_together_as_in_the_original(both, arguments):
    demand_equal(both, arguments)


@pytest.mark.parametrize(
    ("arguments", "levels", "warned"),
    [
        ({}, (), ()),
        ({"rope_fusion": True}, (30,), ()),
        ({"rope_fusion": True, "rope": "quack"}, (30,), ()),
        ({"enable_deepep": False}, (30,), ()),
        ({"experts": "te", "dispatcher": "torch"}, (20,), ()),
        ({"experts": "gmm", "dispatcher": "deepep"}, (), ("FutureWarning",)),
        ({"experts": "gmm", "dispatcher": "torch"}, (20,), ("FutureWarning",)),
    ],
)
def test_a_config_that_is_rewritten_says_so_as_the_original_does(both, arguments, levels, warned):
    # On a GPU with Transformer Engine rope_fusion is true by default, which is one warning more.
    for end in both({"rope_fusion": False, **arguments}):
        assert (end.log_levels, end.warned) == (levels, warned)


@pytest.mark.parametrize("rank", [0, 1])
def test_only_the_first_rank_speaks(both, monkeypatch, rank):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: rank)
    arguments = {"enable_deepep": True, "experts": "te", "dispatcher": "torch"}
    for end in both({"rope_fusion": False, **arguments}):
        assert end.log_levels == (() if rank else (30, 20))


def test_parts_given_as_dicts_become_what_they_are_called():
    config = nemo.BackendConfig(
        te_fp8={"recipe": "mxfp8"},
        linear="te",
        mok={"precision": "mxfp8"},
        cuda_graph={"modules": ["moe_router"]},
    )
    assert config.te_fp8 == nemo.TEFp8Config(recipe="mxfp8")
    assert type(config.te_fp8) is nemo.TEFp8Config
    assert config.mok == nemo.MoKBackendConfig(precision="mxfp8")
    assert config.cuda_graph == nemo.CudaGraphConfig(modules=["moe_router"])


def test_parts_given_as_they_are_are_kept():
    parts = {
        "te_fp8": nemo.TEFp8Config(recipe="block"),
        "mok": nemo.MoKBackendConfig(),
        "cuda_graph": nemo.CudaGraphConfig(),
    }
    config = nemo.BackendConfig(linear="te", **parts)
    assert all(getattr(config, name) is part for name, part in parts.items())


def test_two_configs_share_no_part():
    assert nemo.BackendConfig().cuda_graph is not nemo.BackendConfig().cuda_graph


def test_a_config_can_be_changed_and_is_not_checked_again(original):
    for module in (nemo, original):
        config = module.BackendConfig()
        config.gate_precision = torch.float32
        config.attn = "bogus"
        config.rope_fusion = True
        assert (config.attn, config.gate_precision) == ("bogus", torch.float32)
        replaced = dataclasses.replace(config, linear="torch")
        assert (replaced.attn, replaced.rope_fusion) == ("bogus", False)
        assert type(replaced) is module.BackendConfig


def test_a_mok_config_cannot_be_changed(original):
    for module in (nemo, original):
        with pytest.raises(dataclasses.FrozenInstanceError):
            module.MoKBackendConfig().precision = "mxfp8"


def test_configs_compare_by_value_and_have_no_hash(original):
    for module in (nemo, original):
        assert module.BackendConfig() == module.BackendConfig()
        assert module.BackendConfig(attn="flex") != module.BackendConfig(attn="eager")
        with pytest.raises(TypeError, match="unhashable"):
            hash(module.BackendConfig())
        assert hash(module.MoKBackendConfig()) == hash(module.MoKBackendConfig())


def test_configs_are_of_one_module_only(original):
    assert nemo.BackendConfig() != original.BackendConfig()


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_config_can_be_copied_and_pickled(way):
    config = nemo.BackendConfig(linear="te", te_fp8={"recipe": "block"}, gate_precision="bf16")
    assert way(config) == config
    assert type(way(config).te_fp8) is nemo.TEFp8Config


def test_a_config_becomes_a_dict_as_that_of_the_original_does(original):
    found, expected = (
        dataclasses.asdict(m.BackendConfig(te_fp8={}, linear="te")) for m in (nemo, original)
    )
    assert found == expected


def test_fields_are_given_by_name_only(original):
    for module in (nemo, original):
        with pytest.raises(TypeError):
            module.BackendConfig("sdpa")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp32", torch.float32),
        ("fp16", torch.float16),
        ("torch.float8_e4m3fn", torch.float8_e4m3fn),
        ("complex128", torch.complex128),
    ],
)
def test_a_dtype_name_that_the_original_does_not_know_is_known(name, dtype, original):
    with pytest.raises(KeyError):
        original.BackendConfig(gate_precision=name)
    assert nemo.BackendConfig(gate_precision=name).gate_precision is dtype


def test_a_name_of_no_dtype_is_a_config_error(original):
    with pytest.raises(KeyError):
        original.BackendConfig(gate_precision="floaty")
    with pytest.raises(ConfigError, match="'floaty' is not a dtype"):
        nemo.BackendConfig(gate_precision="floaty")


def test_complex64_is_a_dtype_where_the_original_gives_a_function(original):
    assert original.BackendConfig(gate_precision="complex64").gate_precision is torch.complex
    assert nemo.BackendConfig(gate_precision="complex64").gate_precision is torch.complex64


def test_the_deprecation_points_at_the_caller():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        nemo.BackendConfig(experts="gmm", dispatcher="deepep")
    assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("package", ["mok", "mok.functional"])
def test_a_mok_config_is_built_by_the_package_or_says_that_it_is_missing(
    package, original, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    for module in (nemo, original):
        with pytest.raises(Exception, match="mok"):
            module.MoKBackendConfig().build()


def test_a_mok_config_builds_the_one_of_the_package(original, monkeypatch):
    functional = SimpleNamespace(MoKConfig=dict)
    monkeypatch.setitem(sys.modules, "mok", SimpleNamespace(functional=functional))
    monkeypatch.setitem(sys.modules, "mok.functional", functional)
    config = {"minibatch_size": 512}
    found, expected = (m.MoKBackendConfig(**config).build() for m in (nemo, original))
    assert found == expected
    assert "precision" not in found
