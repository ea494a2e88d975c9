"""A router and the experts that it sends tokens to.

Shapes: T tokens, H the hidden dimension, E experts, K of them for each token, F the intermediate
size of an expert.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from automodel_fn.ops._swiglu import swiglu

ExpertsBackend = Literal["torch", "torch_mm"]
ScoreFunction = Literal["softmax", "sigmoid"]


class TopKGate(nn.Module):
    """Chooses K of E experts for each token, with a weight each.

    Args:
        dim: H.
        num_experts: E.
        top_k: K.
        score: "softmax" over all experts, or "sigmoid" of each.
        norm_top_k: Whether the weights of a token's experts add up to 1.
        precision: What it projects and scores in; None projects in the input's dtype and scores in
            float32.
        device: Where the weight is made.
        dtype: The dtype in which it is stored.

    Attributes:
        weight: `[E, H]`.

    Example:
        >>> gate = TopKGate(4, 8, top_k=2)
        >>> [each.shape for each in gate(torch.ones(3, 4))]
        [torch.Size([3, 2]), torch.Size([3, 2])]
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int,
        score: ScoreFunction = "softmax",
        norm_top_k: bool = True,
        precision: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.top_k, self.norm_top_k, self.precision = top_k, norm_top_k, precision
        self.score: ScoreFunction = score
        self.weight = nn.Parameter(torch.empty(num_experts, dim, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the weight as `nn.Linear` fills its own."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Of `x` `[T, H]` the weights, in its dtype, and the experts, int64; both `[T, K]`."""
        projected = x.dtype if self.precision is None else self.precision
        logits = F.linear(x.to(projected), self.weight.to(projected))
        logits = logits.to(torch.float32 if self.precision is None else self.precision)
        scores = logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()
        weights, experts = scores.topk(self.top_k, dim=-1)
        if self.norm_top_k:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights.to(x.dtype), experts


class Experts(nn.Module):
    """E MLPs with SwiGLU, of which each token goes through K.

    Args:
        num_experts: E.
        dim: H.
        intermediate_size: F.
        backend: "torch" (one product an expert; the host learns how many tokens each has) or
            "torch_mm" (grouped products, nothing waits for the device).
        device: Where the weights are made.
        dtype: The dtype in which they are stored.

    Attributes:
        gate_up_proj: `[E, 2 F, H]`, gates first.
        down_proj: `[E, H, F]`.

    Example:
        >>> experts = Experts(4, 8, 16, dtype=torch.bfloat16)
        >>> x, weights = torch.ones(3, 8).bfloat16(), torch.ones(3, 1).bfloat16()
        >>> experts(x, weights, torch.zeros(3, 1, dtype=torch.int64)).shape
        torch.Size([3, 8])
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        intermediate_size: int,
        *,
        backend: ExpertsBackend = "torch",
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.backend: ExpertsBackend = backend
        sizes = (num_experts, 2 * intermediate_size, dim), (num_experts, dim, intermediate_size)
        made = (nn.Parameter(torch.empty(size, device=device, dtype=dtype)) for size in sizes)
        self.gate_up_proj, self.down_proj = made
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill each expert's weights as `nn.Linear` fills its own."""
        for weight in (self.gate_up_proj, self.down_proj):
            bound = weight.shape[-1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """The sum over each token's experts of their outputs, weighted.

        Args:
            x: `[T, H]`.
            weights: `[T, K]`.
            experts: `[T, K]`, integer.

        Returns:
            `[T, H]`, in the dtype of `x`.
        """
        order = experts.flatten().argsort(stable=True)
        rows = order // experts.shape[1]
        # Unlike bincount this does not wait for the device.
        none = order.new_zeros(len(self.down_proj))
        counts = none.scatter_add(0, experts.flatten().long(), torch.ones_like(order))
        products = _grouped if self.backend == "torch_mm" else _one_by_one
        gate, up = products(x[rows], self.gate_up_proj, counts).chunk(2, dim=-1)
        found = products(swiglu(gate, up), self.down_proj, counts)
        found = found * weights.flatten()[order][:, None].to(found.dtype)
        # Each row back to its place, then added up in one order: the same result in every run.
        placed = torch.zeros_like(found).index_copy(0, order, found)
        return placed.view(*experts.shape, -1).sum(1)


def _grouped(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    ends = counts.cumsum(0).to(torch.int32)
    grouped_mm: Any = getattr(F, "grouped_mm", None) or vars(torch)["_grouped_mm"]
    return grouped_mm(x, weight.mT, offs=ends)


def _one_by_one(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    parts = x.split(counts.tolist())
    return torch.cat([F.linear(part, each) for part, each in zip(parts, weight, strict=True)])
