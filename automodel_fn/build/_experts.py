"""A router and experts by backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from automodel_fn.build._arguments import check_arguments
from automodel_fn.dtypes import parse_dtype
from automodel_fn.nn._experts import Experts, TopKGate
from automodel_fn.ops._experts import GroupedGemm, OneByOne, Product, TorchMM, load_gmm
from automodel_fn.te._grouped import GroupedLinears
from automodel_fn.te._load import load_te_classes


def _te() -> Product:
    load_te_classes()
    return GroupedLinears()


def _gmm() -> Product:
    load_gmm()
    return GroupedGemm()


_PRODUCTS: Mapping[str, Callable[[], Product]] = {
    "torch": OneByOne,
    "torch_mm": TorchMM,
    "te": _te,
    "gmm": _gmm,
}


def gate(
    dim: int,
    num_experts: int,
    *,
    top_k: int,
    score: str = "softmax",
    norm_top_k: bool = True,
    precision: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
) -> nn.Module:
    """A router: `x` `[T, H]` to the weights and the experts of each token, both `[T, K]`.

    Args:
        dim: H.
        num_experts: E.
        top_k: K, at most E.
        score: "softmax" over all experts, or "sigmoid" of each.
        norm_top_k: Whether the weights of a token's experts add up to 1.
        precision: What it projects and scores in; None projects in the input's dtype and scores in
            float32 (`gate_precision` of a BackendConfig).
        device: Where the weight is made. On "meta" it has no memory: give it some with `to_empty`,
            then call `reset_parameters()`.
        dtype: The dtype of the weight.

    Returns:
        A module with `weight` `[E, H]` and `reset_parameters()`.

    Raises:
        ConfigError: An argument is not as described; all that is wrong is listed.

    Source:
        `Gate` (NeMo Automodel).

    Example:
        >>> weights, experts = gate(4, 8, top_k=2, dtype="fp32")(torch.ones(3, 4))
        >>> weights.shape, experts.shape
        (torch.Size([3, 2]), torch.Size([3, 2]))
    """
    sizes: dict[str, object] = {"dim": dim, "num_experts": num_experts, "top_k": top_k}
    wrong: list[str] = []
    if score not in ("softmax", "sigmoid"):
        wrong.append(f"score={score!r} must be 'softmax' or 'sigmoid'")
    if all(isinstance(size, int) for size in sizes.values()) and top_k > num_experts:
        wrong.append(f"top_k={top_k} must be at most num_experts={num_experts}")
    stored = check_arguments("a gate", "torch", ("torch",), sizes, dtype, wrong)
    chosen: Any = score
    return TopKGate(
        dim,
        num_experts,
        top_k=top_k,
        score=chosen,
        norm_top_k=norm_top_k,
        precision=None if precision is None else parse_dtype(precision),
        device=device,
        dtype=stored,
    )


def experts(
    num_experts: int,
    dim: int,
    intermediate_size: int,
    *,
    backend: str = "torch",
    device: torch.device | str | None = None,
    dtype: torch.dtype | str = torch.bfloat16,
) -> nn.Module:
    """Experts with SwiGLU: `x` `[T, H]`, weights and experts `[T, K]`, to `[T, H]`.

    Args:
        num_experts: E.
        dim: H.
        intermediate_size: F.
        backend: "torch" (one product an expert), "torch_mm" (grouped products, of bf16 on a GPU;
            nothing waits for the device), "te" (Transformer Engine's GroupedLinear, also in FP8; it
            sees the step context without `patch_te`), or "gmm" (the package grouped_gemm, in bf16).
        device: Where the weights are made. On "meta" they have no memory: give them some with
            `to_empty`, then call `reset_parameters()`.
        dtype: The dtype of the weights.

    Returns:
        A module with `gate_up_proj` `[E, 2 F, H]`, gates first, `down_proj` `[E, H, F]` and
        `reset_parameters()`: `module(x, weights, experts)`.

    Raises:
        ConfigError: An argument is not as described; all that is wrong is listed.
        BackendUnavailableError: Transformer Engine or grouped_gemm cannot be imported here.

    Source:
        `GroupedExperts` (NeMo Automodel); the layout of the weights is that of transformers 5.

    Example:
        >>> x, weights = torch.ones(3, 8), torch.ones(3, 1)
        >>> made = experts(4, 8, 16, dtype="fp32")
        >>> made(x, weights, torch.zeros(3, 1, dtype=torch.int64)).shape
        torch.Size([3, 8])
    """
    sizes: dict[str, object] = {
        "num_experts": num_experts,
        "dim": dim,
        "intermediate_size": intermediate_size,
    }
    stored = check_arguments("experts", backend, tuple(_PRODUCTS), sizes, dtype)
    product = _PRODUCTS[backend]()
    return Experts(
        num_experts, dim, intermediate_size, product=product, device=device, dtype=stored
    )
