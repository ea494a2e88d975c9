"""A router and the experts that it sends tokens to.

Shapes: T tokens, H the hidden dimension, E experts, K of them for each token, F the intermediate
size of an expert.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from automodel_fn.ops._experts import PRODUCT, OneByOne, Product, Stacked, through_experts
from automodel_fn.ops._swiglu_packed import swiglu_packed

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
        product: How rows are multiplied, each by the weight of its expert.
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
        product: Product | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        vars(self)[PRODUCT] = OneByOne() if product is None else product
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
        layers = (
            Stacked(self.gate_up_proj, name="gate_up_proj"),
            Stacked(self.down_proj, name="down_proj"),
        )
        return through_experts(
            x, experts, weights, product=vars(self)[PRODUCT], layers=layers, gate=swiglu_packed
        )
