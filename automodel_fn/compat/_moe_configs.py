"""Two parts of the original's BackendConfig: the settings of CUDA graphs and of its MoE kernel.

Plain data with the original's checks: what they configure is not in this library.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from automodel_fn.errors import BackendUnavailableError, ConfigError

_GRAPH_MODULES = ("attn", "te_dpa", "moe_router", "moe_preprocess")


@dataclass(kw_only=True)
class CudaGraphConfig:
    """Which modules of a layer are captured in CUDA graphs; an empty list disables them.

    Args:
        modules: Of "attn", "te_dpa", "moe_router" and "moe_preprocess".

    Raises:
        TypeError: Not a list of strings.
        ConfigError: An unknown, repeated or contradictory module.
    """

    modules: list[Literal["attn", "te_dpa", "moe_router", "moe_preprocess"]] = field(
        default_factory=list[Literal["attn", "te_dpa", "moe_router", "moe_preprocess"]]
    )

    def __post_init__(self) -> None:
        modules: Any = self.modules
        if not isinstance(modules, list) or not all(isinstance(item, str) for item in modules):
            raise TypeError(f"cuda_graph.modules={modules!r} must be a list of strings.")
        chosen: set[str] = set(self.modules)
        unknown = sorted(chosen - set(_GRAPH_MODULES))
        wrong = [
            (unknown, f"has {unknown}, which must be of {sorted(_GRAPH_MODULES)}"),
            (len(chosen) < len(self.modules), "must not name a module twice"),
            ({"attn", "te_dpa"} <= chosen, "cannot have both 'attn' and 'te_dpa'"),
            (
                "moe_preprocess" in chosen and "moe_router" not in chosen,
                "has 'moe_preprocess', which requires 'moe_router'",
            ),
        ]
        _raise_first("cuda_graph.modules", self.modules, wrong)


@dataclass(kw_only=True, frozen=True)
class MoKBackendConfig:
    """Settings of the Mixture-of-Kittens kernels, used with `dispatcher="mok"`.

    Args:
        precision: "bf16" or "mxfp8".
        fwd_num_comm_sms: Streaming multiprocessors for communication in the forward; even.
        bwd_num_comm_sms: The same in the backward; even.
        minibatch_size: Tokens that overlap; a multiple of 256.
        macrobatch_size: Tokens of the ring buffer; a multiple of `minibatch_size`.
        schedule_capacity_multiplier: Largest fraction of routes sent to one rank.
        all_gather_top_experts_chunk_bytes: Bytes of a chunk; a multiple of 16.

    Raises:
        ConfigError: A value out of these bounds.
    """

    precision: Literal["bf16", "mxfp8"] = "bf16"
    fwd_num_comm_sms: int = 40
    bwd_num_comm_sms: int = 28
    minibatch_size: int = 4096
    macrobatch_size: int = 131072
    schedule_capacity_multiplier: float = 0.5
    all_gather_top_experts_chunk_bytes: int = 2048

    def __post_init__(self) -> None:
        if self.precision not in ("bf16", "mxfp8"):
            raise ConfigError(f"mok.precision={self.precision!r} must be 'bf16' or 'mxfp8'.")
        _check_multiple("fwd_num_comm_sms", self.fwd_num_comm_sms, 2)
        _check_multiple("bwd_num_comm_sms", self.bwd_num_comm_sms, 2)
        _check_multiple("minibatch_size", self.minibatch_size, 256)
        _check_multiple("macrobatch_size", self.macrobatch_size, self.minibatch_size)
        _check_multiple(
            "all_gather_top_experts_chunk_bytes", self.all_gather_top_experts_chunk_bytes, 16
        )
        capacity: Any = self.schedule_capacity_multiplier
        if type(capacity) not in (int, float) or not math.isfinite(capacity) or capacity <= 0:
            raise ConfigError(
                f"mok.schedule_capacity_multiplier={capacity!r} must be a positive finite number."
            )

    def build(self) -> Any:
        """The kernels' own `mok.functional.MoKConfig`.

        Raises:
            BackendUnavailableError: Mixture-of-Kittens is not installed.
        """
        try:
            from mok.functional import (  # pyright: ignore[reportMissingImports]
                MoKConfig,
            )
        except ImportError as error:
            raise BackendUnavailableError(
                f"dispatcher='mok' needs Mixture-of-Kittens, which cannot be imported: {error}."
            ) from error
        names = [name for name in self.__dataclass_fields__ if name != "precision"]
        return MoKConfig(**{name: getattr(self, name) for name in names})


def _check_multiple(name: str, value: object, of: int) -> None:
    if type(value) is not int or value <= 0 or value % of:
        raise ConfigError(f"mok.{name}={value!r} must be a positive int, a multiple of {of}.")


def _raise_first(name: str, value: object, checks: list[tuple[Any, str]]) -> None:
    for is_wrong, what in checks:
        if is_wrong:
            raise ConfigError(f"{name}={value!r} {what}.")
