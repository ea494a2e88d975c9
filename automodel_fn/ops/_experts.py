"""A mixture of experts: two grouped products, a gate between them, and the way there and back.

Shapes: T tokens, H the hidden dimension, E experts, K of them for each token, F the intermediate
size of an expert, R the rows of all experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from automodel_fn.errors import BackendUnavailableError, ConfigError
from automodel_fn.ops._routing import Routing, bias_of_rows, combined, dispatched, routing_of

PRODUCT = "_automodel_fn_product"
"""The attribute of experts that says how their rows are multiplied."""


class Stacked(NamedTuple):
    """The weights of one linear layer of all experts; a tuple, which torch.compile can make.

    Args:
        weight: `[E, out, in]`; where they are transposed, `[E, in, out]`.
        name: What it is called.
        bias: `[E, out]`, or None.
        is_transposed: Whether they are.
    """

    weight: Tensor
    name: str
    bias: Tensor | None = None
    is_transposed: bool = False


class Product(Protocol):
    """How rows are multiplied, each by the weight of its expert."""

    def multiple(self) -> int | None:
        """Each expert needs a multiple of so many rows; None: the host need not know how many."""
        ...

    def __call__(self, x: Tensor, layer: Stacked, routing: Routing) -> Tensor:
        """Of `x` `[R, in]` the product with the weights, `[R, out]`, with the bias added."""
        ...


def through_experts(
    x: Tensor,
    chosen: Tensor,
    weights: Tensor,
    *,
    product: Product,
    layers: tuple[Stacked, Stacked],
    gate: Callable[[Tensor], Tensor],
    norm: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The sum over each token's experts of their outputs, weighted.

    It computes in the dtype of the weights, or in that of autocast.

    Args:
        x: `[T, H]`.
        chosen: `[T, K]`, integer: the experts of each token.
        weights: `[T, K]`: of each token's experts.
        product: How rows are multiplied.
        layers: The layer before the gate and the one after it.
        gate: What is between them, of the rows.
        norm: What comes after them, of the rows; None for nothing.

    Returns:
        `[T, H]`, in the dtype of `x`.

    Example:
        >>> up, down = (Stacked(torch.ones(2, 4, 4), name=name) for name in ("up", "down"))
        >>> chosen, weights = torch.tensor([[1]]), torch.tensor([[0.5]])
        >>> through_experts(torch.ones(1, 4), chosen, weights, product=TorchMM(),
        ...     layers=(up, down), gate=torch.relu)
        tensor([[8., 8., 8., 8.]])
    """
    before, after = layers
    routing = routing_of(chosen, len(before.weight), product.multiple())
    rows = dispatched(x.to(_compute_dtype(before.weight)), routing)
    rows = product(gate(product(rows, before, routing)), after, routing)
    return combined(rows if norm is None else norm(rows), weights, routing, x.dtype)


def _compute_dtype(weight: Tensor) -> torch.dtype:
    device = weight.device.type
    is_on = device != "meta" and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if is_on else weight.dtype


class TorchMM:
    """By `torch.nn.functional.grouped_mm`; nothing waits for the device."""

    def multiple(self) -> int | None:
        """The host need not know."""
        return None

    def __call__(self, x: Tensor, layer: Stacked, routing: Routing) -> Tensor:
        """As `Product`."""
        weight = layer.weight.to(x.dtype)
        grouped_mm: Any = getattr(F, "grouped_mm", None) or vars(torch)["_grouped_mm"]
        out = grouped_mm(x, weight if layer.is_transposed else weight.mT, offs=routing.ends)
        return _biased(out, layer, routing)


class OneByOne:
    """By one product an expert; the host waits to learn how many rows each has."""

    def multiple(self) -> int | None:
        """Any number will do."""
        return 1

    def __call__(self, x: Tensor, layer: Stacked, routing: Routing) -> Tensor:
        """As `Product`."""
        weight = layer.weight.mT if layer.is_transposed else layer.weight
        parts = x.split(list(routing.splits or ()))
        found = [F.linear(rows, each) for rows, each in zip(parts, weight, strict=True)]
        return _biased(torch.cat(found), layer, routing)


class GroupedGemm:
    """By the package grouped_gemm, in bf16; the host waits to learn how many rows there are."""

    def multiple(self) -> int | None:
        """Any number will do."""
        return 1

    def __call__(self, x: Tensor, layer: Stacked, routing: Routing) -> Tensor:
        """As `Product`.

        Raises:
            ConfigError: The dtype to compute in is not bf16.
        """
        if x.dtype != torch.bfloat16:
            raise ConfigError(
                f"experts='gmm' multiplies in torch.bfloat16 only, found {x.dtype}; cast the "
                "model, use torch.autocast, or experts='torch_mm'."
            )
        splits = torch.tensor(routing.splits or (), dtype=torch.int64, device="cpu")
        weight = layer.weight.to(x.dtype)
        out = load_gmm()(x, weight, splits, trans_b=not layer.is_transposed)
        return _biased(out, layer, routing)


def load_gmm() -> Callable[..., Tensor]:
    """`grouped_gemm.ops.gmm`.

    Raises:
        BackendUnavailableError: The package is not installed, or cannot be imported.
    """
    try:
        from grouped_gemm.ops import gmm  # pyright: ignore[reportMissingImports]
    # What its extension raises varies: a missing file, an undefined symbol, no driver.
    except Exception as error:
        raise BackendUnavailableError(
            f"experts='gmm' needs grouped_gemm, which cannot be imported ({error}); "
            "pip install grouped_gemm where there is nvcc, or use experts='torch_mm'."
        ) from error
    return gmm


def _biased(out: Tensor, layer: Stacked, routing: Routing) -> Tensor:
    if layer.bias is None:
        return out
    return out + bias_of_rows(layer.bias.to(out.dtype), routing)
