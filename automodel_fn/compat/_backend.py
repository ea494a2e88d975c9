"""The original's BackendConfig: mutable, with its defaults, fallbacks and warnings."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from automodel_fn.compat._fp8 import TEFp8Settings
from automodel_fn.compat._moe_configs import CudaGraphConfig, MoKBackendConfig
from automodel_fn.compat._packages import (
    HAVE_DEEP_EP,
    HAVE_TE,
    HAVE_UCCL_EP,
    LOGGER,
    is_first_rank,
)
from automodel_fn.dtypes import parse_dtype
from automodel_fn.errors import ConfigError

AttentionBackend = Literal[
    "torch", "te", "sdpa", "flex", "eager", "tilelang", "cudnn", "fa4", "magi"
]
_FLEX_DISPATCHERS = ("deepep", "hybridep", "uccl_ep")

_on_gpu = torch.cuda.is_available()
_te_on_gpu = HAVE_TE and _on_gpu
_default_dispatcher: Any = (
    "deepep" if HAVE_DEEP_EP and _on_gpu else "uccl_ep" if HAVE_UCCL_EP and _on_gpu else "torch"
)


@dataclass(kw_only=True)
class BackendSettings:
    """Backends of a model's parts, as the original describes and rewrites them.

    What each field selects is in the original's documentation. New code takes
    `automodel_fn.BackendConfig`, which is checked, frozen, and resolved with reasons.

    Raises:
        ConfigError: A combination that the original refuses.
        TypeError: `mok` or `cuda_graph` of another type.
    """

    _fp8_config: ClassVar[type[TEFp8Settings]] = TEFp8Settings

    attn: AttentionBackend = "te" if _te_on_gpu else "sdpa"
    sparse_attn: Literal["generic", "msa"] = "generic"
    linear: Literal["torch", "te", "quack"] = "te" if _te_on_gpu else "torch"
    rms_norm: Literal["torch", "torch_fp32", "te", "quack"] = "torch_fp32"
    rope: Literal["torch", "quack", "triton"] = "torch"
    rope_fusion: bool = _te_on_gpu
    experts: Literal["torch", "te", "gmm", "torch_mm", "torch_mm_mxfp8"] = (
        "torch_mm" if _on_gpu else "torch"
    )
    dispatcher: Literal["torch", "deepep", "hybridep", "uccl_ep", "mok"] = _default_dispatcher
    te_grouped_tensor: bool = False
    dispatcher_num_sms: int = 20
    dispatcher_share_token_dispatcher: bool = True
    dispatcher_async_dispatch: bool = False
    mok: MoKBackendConfig = field(default_factory=MoKBackendConfig)
    dispatcher_hybridep_permute_fusion: bool = False
    dispatcher_hybridep_compact_routing: bool = False
    dispatcher_hybridep_num_sms_preprocessing: int | None = None
    dispatcher_hybridep_num_blocks_permute: int | None = None
    dispatcher_hybridep_num_blocks_unpermute: int | None = None
    enable_deepep: bool | None = None
    fake_balanced_gate: bool = False
    fake_gate_noise: float = 0.0
    enable_hf_state_dict_adapter: bool = True
    enable_fsdp_optimizations: bool = False
    te_fp8: TEFp8Settings | None = None
    gate_precision: str | torch.dtype | None = None
    compile_attn: bool = False
    compile_situ: bool = False
    compile_norm: bool = False
    shared_expert_overlap: bool = False
    compile_router_weight: bool = False
    benchmark_static_routing: bool = False
    cuda_graph: CudaGraphConfig = field(default_factory=CudaGraphConfig)

    def __post_init__(self) -> None:
        _check_fields(self)
        _disable_rope_fusion(self)
        _normalize(self)
        _ignore_deepep(self)
        _check_grouped_tensor(self)
        _fall_back_to_torch(self)
        _check_cuda_graph(self)
        if self.te_fp8 is not None and "te" not in (self.linear, self.experts):
            raise ConfigError(
                "te_fp8 requires at least one TE backend (linear='te' or experts='te'), but got "
                f"linear={self.linear!r}, experts={self.experts!r}."
            )


def _check_fields(config: BackendSettings) -> None:
    is_static = config.fake_balanced_gate and config.fake_gate_noise == 0.0
    if config.benchmark_static_routing and not is_static:
        raise ConfigError(
            "benchmark_static_routing=True requires fake_balanced_gate=True and "
            "fake_gate_noise=0.0: any other gate makes the routing that it keeps wrong."
        )
    if config.sparse_attn not in ("generic", "msa"):
        raise ConfigError(f"sparse_attn={config.sparse_attn!r} must be 'generic' or 'msa'.")


def _disable_rope_fusion(config: BackendSettings) -> None:
    if config.rope == "quack" and config.rope_fusion:
        LOGGER.warning("rope='quack' cannot be combined with rope_fusion=True, which is disabled.")
        config.rope_fusion = False
    if config.rope_fusion:
        LOGGER.warning("rope_fusion is disabled for every model (NVIDIA-NeMo/Automodel #3027).")
    config.rope_fusion = False


def _normalize(config: BackendSettings) -> None:
    given: Any = config
    if isinstance(given.te_fp8, dict):
        config.te_fp8 = config._fp8_config(**given.te_fp8)
    if isinstance(given.cuda_graph, dict):
        config.cuda_graph = CudaGraphConfig(**given.cuda_graph)
    elif not isinstance(given.cuda_graph, CudaGraphConfig):
        raise TypeError(f"cuda_graph={given.cuda_graph!r} must be a CudaGraphConfig or a mapping.")
    if isinstance(given.mok, dict):
        config.mok = MoKBackendConfig(**given.mok)
    elif not isinstance(given.mok, MoKBackendConfig):
        raise TypeError(f"mok={given.mok!r} must be a MoKBackendConfig or a mapping.")
    if isinstance(config.gate_precision, str):
        config.gate_precision = parse_dtype(config.gate_precision.lower())
    if config.experts == "gmm":
        warnings.warn(
            "experts='gmm' is deprecated; use experts='torch_mm'.", FutureWarning, stacklevel=4
        )


def _ignore_deepep(config: BackendSettings) -> None:
    if config.enable_deepep is not None and is_first_rank():
        LOGGER.warning(
            "enable_deepep=%s is ignored; set dispatcher and experts instead. True was "
            "experts='gmm' with dispatcher='deepep', False was dispatcher='torch'.",
            config.enable_deepep,
        )
    config.enable_deepep = None


def _check_grouped_tensor(config: BackendSettings) -> None:
    if not config.te_grouped_tensor:
        return
    if config.experts != "te":
        raise ConfigError(
            f"te_grouped_tensor=True requires experts='te', but got experts={config.experts!r}."
        )
    if config.dispatcher not in _FLEX_DISPATCHERS:
        raise ConfigError(
            "te_grouped_tensor=True requires dispatcher='deepep', 'hybridep' or 'uccl_ep', "
            f"but got dispatcher={config.dispatcher!r}."
        )


def _fall_back_to_torch(config: BackendSettings) -> None:
    takes_any = config.experts not in ("te", "gmm")
    if takes_any or config.dispatcher in (*_FLEX_DISPATCHERS, "mok"):
        return
    if is_first_rank():
        LOGGER.info(
            "experts=%r needs dispatcher='deepep' or 'uccl_ep', not %r; it is set to torch, and "
            "experts to torch_mm.",
            config.experts,
            config.dispatcher,
        )
    config.dispatcher, config.experts = "torch", "torch_mm"


def _check_cuda_graph(config: BackendSettings) -> None:
    modules = set(config.cuda_graph.modules)
    of_attention = sorted(modules & {"attn", "te_dpa"})
    recipe = getattr(config.te_fp8, "recipe", None)
    has_fp8_attention = bool(getattr(recipe, "fp8_dpa", False))
    refused = (
        (of_attention, "attn", config.attn, "te"),
        ("attn" in modules, "linear", config.linear, "torch"),
        ("attn" in modules, "rms_norm", config.rms_norm, "torch"),
        (of_attention, "te_fp8.recipe.fp8_dpa", has_fp8_attention, False),
        ("moe_router" in modules, "fake_balanced_gate", bool(config.fake_balanced_gate), False),
        ("moe_preprocess" in modules, "dispatcher", config.dispatcher, "hybridep"),
    )
    for is_captured, name, found, needed in refused:
        if is_captured and found != needed:
            raise ConfigError(
                f"cuda_graph.modules={config.cuda_graph.modules!r} requires {name}={needed!r}, "
                f"but got {name}={found!r}."
            )
