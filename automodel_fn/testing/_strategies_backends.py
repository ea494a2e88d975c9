"""Strategies for backends: what may be asked for, and what a machine may have."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from automodel_fn.backend._availability import Availability, Device, Package
from automodel_fn.backend._config import BackendConfig
from automodel_fn.backend._fp8 import RECIPES
from automodel_fn.backend._needs import PACKAGES
from automodel_fn.backend._rules import CHOICES, HEAD_PRECISIONS
from automodel_fn.errors import ConfigError

_VERSIONS = (None, "0.9", "1.13.0", "2.2", "2.3.0.dev0", "2.8.0+cu12", "2.20.2", "unknown")
_CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **{name: st.sampled_from(values) for name, values in CHOICES.items()},
    "rope_fusion": st.sampled_from(("auto", True, False)),
    "async_masks": st.sampled_from(("auto", True, False)),
    "dispatcher_num_sms": st.integers(1, 132),
    "dispatcher_share_token_dispatcher": st.booleans(),
    "dispatcher_async_dispatch": st.booleans(),
    "fake_balanced_gate": st.booleans(),
    "fake_gate_noise": st.floats(0, 1),
    "enable_hf_state_dict_adapter": st.booleans(),
    "enable_fsdp_optimizations": st.booleans(),
    "te_fp8": st.sampled_from((None, *RECIPES)),
    "lm_head_precision": st.sampled_from((None, *HEAD_PRECISIONS)),
    "gate_precision": st.sampled_from((None, torch.float32, torch.bfloat16)),
    "compile_attn": st.booleans(),
}


def backend_configs() -> st.SearchStrategy[BackendConfig]:
    """Every BackendConfig that can be made; the default one is the simplest.

    Example:
        >>> from hypothesis import find
        >>> find(backend_configs(), lambda config: config.attn == "te").linear
        'auto'
    """
    return st.fixed_dictionaries({}, optional=_FIELDS).map(_config)


def cpu_backends() -> st.SearchStrategy[BackendConfig]:
    """Every BackendConfig of which a CPU without packages can run all that modules are told.

    Example:
        >>> from hypothesis import find
        >>> find(cpu_backends(), lambda config: config.attn == "eager").linear
        'auto'
    """
    fields = {
        "attn": st.sampled_from(("auto", "sdpa", "eager", "flex")),
        "linear": st.sampled_from(("auto", "torch")),
        "rms_norm": st.sampled_from(("torch_fp32", "torch")),
        **{name: _FIELDS[name] for name in ("rope_fusion", "async_masks", "swiglu", "loss")},
        **{name: _FIELDS[name] for name in ("lm_head_precision", "gate_precision", "compile_attn")},
        **{name: _FIELDS[name] for name in ("fake_balanced_gate", "fake_gate_noise")},
    }
    return st.fixed_dictionaries({}, optional=fields).map(_config)


def _config(fields: dict[str, Any]) -> BackendConfig:
    # Fields that do not go together are left out one by one, which is quicker than to draw again.
    while True:
        try:
            return BackendConfig(**fields)
        except ConfigError:
            fields = dict(list(fields.items())[:-1])


def availabilities() -> st.SearchStrategy[Availability]:
    """Every kind of machine: GPUs old and new, packages of any version, broken or missing.

    A CPU with nothing installed is the simplest.

    Example:
        >>> from hypothesis import find
        >>> find(availabilities(), lambda found: found.verdict("linear=te").can_run).devices
        (Device(name='GPU', capability=(8, 0), memory_bytes=1073741824),)
    """
    devices = st.lists(st.sampled_from(_CAPABILITIES).map(_device), max_size=2).map(tuple)
    packages = st.tuples(*map(_packages, PACKAGES))
    return st.builds(
        Availability,
        python=st.just("3.12.0"),
        torch=st.just("2.13.0"),
        cuda=st.sampled_from((None, "12.8", "12.9", "13.0")),
        devices=devices,
        packages=packages,
        world_size=st.sampled_from((1, 2, 8)),
    )


def _device(capability: tuple[int, int]) -> Device:
    return Device("GPU", capability=capability, memory_bytes=1 << 30)


def _packages(name: str) -> st.SearchStrategy[Package]:
    return st.builds(
        Package,
        st.just(name),
        version=st.sampled_from(_VERSIONS),
        problem=st.sampled_from(("", "", "", "its module is gone")),
    )
