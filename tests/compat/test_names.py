import dataclasses
import importlib.util
import inspect

import pytest
import torch

from automodel_fn.compat import nemo

PUBLIC = (
    "AttentionBackend",
    "BackendConfig",
    "Float32RMSNorm",
    "TEFp8Config",
    "cast_frozen_modules_to_compute_dtype",
    "cast_model_to_dtype",
    "compute_lm_head_logits",
    "get_is_first_microbatch",
    "get_is_optim_step",
    "get_rope_config",
    "initialize_linear_module",
    "initialize_rms_norm_module",
    "prepare_frozen_parameters_for_sharding",
    "set_is_first_microbatch",
    "set_is_optim_step",
)
# Names, order, kinds and defaults of the parameters, as 0.7.0 has them.
SIGNATURES = {
    "TEFp8Config": "(*, recipe='current')",
    "CudaGraphConfig": "(*, modules=<factory>)",
    "Float32RMSNorm": "(dim, eps=1e-05, device=None, dtype=torch.bfloat16)",
    "_float32_rms_norm_fwd": "(x, weight, eps)",
    "_get_fp32_module_keywords": "(model)",
    "_get_strict_fp32_module_keywords": "(model)",
    "_has_dtensor_params": "(model)",
    "_make_lazy_te_patcher": "()",
    "_patch_te_modules": "()",
    "_restore_fp32_buffers": "(model, fp32_keywords)",
    "_restore_fp32_modules": "(model, fp32_keywords)",
    "_restore_fp32_tensor_snapshots": "(model, *, parameter_snapshots, buffer_snapshots)",
    "_snapshot_fp32_tensors": "(model, *, parameter_keywords, buffer_keywords)",
    "cast_frozen_modules_to_compute_dtype": "(model, compute_dtype)",
    "cast_model_to_dtype": (
        "(model, dtype=torch.bfloat16, skip_modules=(), *, ignore_preserved_dtypes=False)"
    ),
    "compute_lm_head_logits": (
        "(lm_head, hidden_states, logits_to_keep=0, is_thd=False, fp32_lm_head=False, "
        "output_hidden_states=False)"
    ),
    "get_is_first_microbatch": "()",
    "get_is_optim_step": "()",
    "get_rope_config": "(config)",
    "initialize_linear_module": (
        "(linear_impl, in_features, out_features, bias=False, device=None, dtype=torch.bfloat16)"
    ),
    "initialize_rms_norm_module": (
        "(rms_norm_impl, dim, eps=1e-05, device=None, dtype=torch.bfloat16)"
    ),
    "is_tensor_unallocated": "(tensor)",
    "prepare_frozen_parameters_for_sharding": "(model, compute_dtype)",
    "set_is_first_microbatch": "(value)",
    "set_is_optim_step": "(value)",
    "yield_fp32_model": "(model, restore_dtype=None)",
}
DATA = (
    "HAVE_DEEP_EP",
    "HAVE_TE",
    "HAVE_UCCL_EP",
    "IS_FIRST_MICROBATCH",
    "IS_OPTIM_STEP",
    "logger",
)
MOK_DEFAULTS = {
    "precision": "bf16",
    "fwd_num_comm_sms": 40,
    "bwd_num_comm_sms": 28,
    "minibatch_size": 4096,
    "macrobatch_size": 131072,
    "schedule_capacity_multiplier": 0.5,
    "all_gather_top_experts_chunk_bytes": 2048,
}
ON_GPU = torch.cuda.is_available()
TE_ON_GPU = nemo.HAVE_TE and ON_GPU
BACKEND_DEFAULTS = {
    "attn": "te" if TE_ON_GPU else "sdpa",
    "sparse_attn": "generic",
    "linear": "te" if TE_ON_GPU else "torch",
    "rms_norm": "torch_fp32",
    "rope": "torch",
    "rope_fusion": TE_ON_GPU,
    "experts": "torch_mm" if ON_GPU else "torch",
    "dispatcher": (
        "torch"
        if not ON_GPU
        else "deepep"
        if nemo.HAVE_DEEP_EP
        else "uccl_ep"
        if nemo.HAVE_UCCL_EP
        else "torch"
    ),
    "te_grouped_tensor": False,
    "dispatcher_num_sms": 20,
    "dispatcher_share_token_dispatcher": True,
    "dispatcher_async_dispatch": False,
    "mok": nemo.MoKBackendConfig,
    "dispatcher_hybridep_permute_fusion": False,
    "dispatcher_hybridep_compact_routing": False,
    "dispatcher_hybridep_num_sms_preprocessing": None,
    "dispatcher_hybridep_num_blocks_permute": None,
    "dispatcher_hybridep_num_blocks_unpermute": None,
    "enable_deepep": None,
    "fake_balanced_gate": False,
    "fake_gate_noise": 0.0,
    "enable_hf_state_dict_adapter": True,
    "enable_fsdp_optimizations": False,
    "te_fp8": None,
    "gate_precision": None,
    "compile_attn": False,
    "compile_situ": False,
    "compile_norm": False,
    "shared_expert_overlap": False,
    "compile_router_weight": False,
    "benchmark_static_routing": False,
    "cuda_graph": nemo.CudaGraphConfig,
}


def _without_types(value):
    signature = inspect.signature(value)
    parameters = [p.replace(annotation=p.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def _defaults(cls):
    return {
        field.name: field.default if field.default_factory is dataclasses.MISSING else None
        for field in dataclasses.fields(cls)
    }


def _literals(table):
    return {name: None if inspect.isclass(value) else value for name, value in table.items()}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_name_has_the_parameters_that_it_had(name):
    ours = _without_types(getattr(nemo, name))
    if name == "Float32RMSNorm":
        ours = ours.replace(", *, weight_multiply='fp32'", "")

    assert ours == SIGNATURES[name]


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_table_of_parameters_is_that_of_the_original(name, original):
    assert _without_types(getattr(original, name)) == SIGNATURES[name]


def test_the_public_names_are_the_same(original):
    assert tuple(nemo.__all__) == PUBLIC
    assert tuple(original.__all__) == PUBLIC


def test_the_public_names_are_there():
    assert tuple(nemo.__all__) == PUBLIC
    assert set(PUBLIC) <= {*SIGNATURES, "AttentionBackend", "BackendConfig"}
    for name in PUBLIC:
        assert getattr(nemo, name).__doc__ or name == "AttentionBackend", name


@pytest.mark.parametrize("name", DATA)
def test_data_have_the_types_that_they_had(name, original):
    assert type(getattr(nemo, name)) is type(getattr(original, name))


@pytest.mark.parametrize("name", ["HAVE_DEEP_EP", "HAVE_TE", "HAVE_UCCL_EP"])
def test_what_is_installed_is_found_alike(name, original):
    assert getattr(nemo, name) is getattr(original, name)


def test_have_gmm_says_whether_grouped_gemm_is_installed():
    assert nemo.HAVE_GMM is (importlib.util.find_spec("grouped_gemm") is not None)


def test_the_logger_has_the_name_of_the_module():
    assert nemo.logger.name == nemo.__name__


def test_the_flags_are_found_among_the_names_of_the_module():
    assert {"IS_FIRST_MICROBATCH", "IS_OPTIM_STEP"} <= set(dir(nemo))


def test_a_name_that_was_never_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'IS_LAST_MICROBATCH'"):
        _ = nemo.IS_LAST_MICROBATCH


def test_the_attention_backends_are_the_same(original):
    assert nemo.AttentionBackend == original.AttentionBackend


def test_a_backend_config_has_the_fields_and_defaults_that_it_had():
    assert _defaults(nemo.BackendConfig) == _literals(BACKEND_DEFAULTS)
    assert list(_defaults(nemo.BackendConfig)) == list(BACKEND_DEFAULTS)
    assert all(field.kw_only for field in dataclasses.fields(nemo.BackendConfig))


def test_a_mok_config_has_the_fields_and_defaults_that_it_had():
    assert _defaults(nemo.MoKBackendConfig) == MOK_DEFAULTS


def test_the_tables_of_fields_are_those_of_the_original(original):
    assert _defaults(original.BackendConfig) == _literals(BACKEND_DEFAULTS)
    assert list(_defaults(original.BackendConfig)) == list(BACKEND_DEFAULTS)
    assert _defaults(original.MoKBackendConfig) == MOK_DEFAULTS


@pytest.mark.parametrize(
    "name", ["BackendConfig", "TEFp8Config", "CudaGraphConfig", "MoKBackendConfig"]
)
def test_a_config_is_shown_as_it_was(name, original):
    assert repr(getattr(nemo, name)()) == repr(getattr(original, name)())
