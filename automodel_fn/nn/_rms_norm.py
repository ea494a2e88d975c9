"""RMSNorm as a module."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor, nn

from automodel_fn.dtypes import parse_dtype
from automodel_fn.errors import ConfigError, itemized
from automodel_fn.ops._rms_norm import WeightMultiply, complaints_about_options, rms_norm_fp32


class Float32RMSNorm(nn.Module):
    """RMSNorm over the last dimension, computed in float32 whatever is stored: see `rms_norm_fp32`.

    Args:
        dim: H, the size of the last dimension.
        eps: Added to the mean of the squares; at least 0.
        device: Where the weight is made; "meta" works too.
        dtype: The dtype in which the weight is stored.
        weight_multiply: "fp32" (NeMo Automodel, Transformer Engine) or "input" (Hugging Face).

    Attributes:
        weight: `[H]`, made of ones.

    Raises:
        ConfigError: An argument is not as described.

    Source:
        Replaces `Float32RMSNorm` (NeMo Automodel).

    Example:
        >>> norm = Float32RMSNorm(2)
        >>> norm(torch.tensor([3.0, 4.0])).detach(), list(norm.state_dict())
        (tensor([0.8485, 1.1314]), ['weight'])
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | str = torch.bfloat16,
        *,
        weight_multiply: WeightMultiply = "fp32",
    ) -> None:
        super().__init__()
        stored = parse_dtype(dtype)
        lines = complaints_about_options(eps, weight_multiply)
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            lines.insert(0, f"dim={dim!r} must be an integer of at least 1")
        if not stored.is_floating_point:
            lines.append(f"dtype={stored} must be floating point")
        if lines:
            raise ConfigError(itemized("Float32RMSNorm cannot be made:", lines))
        self.eps = eps
        self.weight_multiply: WeightMultiply = weight_multiply
        self.weight = nn.Parameter(torch.empty(dim, device=device, dtype=stored))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fill the weight with ones."""
        nn.init.ones_(self.weight)

    @overload
    def forward(self, x: Tensor, residual: None = None) -> Tensor: ...

    @overload
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]: ...

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """The norm of `x` `[..., H]`, in its dtype; with a residual that of the sum, and it."""
        multiply = self.weight_multiply
        if residual is None:
            return rms_norm_fp32(x, self.weight, self.eps, weight_multiply=multiply)
        return rms_norm_fp32(x, self.weight, self.eps, weight_multiply=multiply, residual=residual)

    def extra_repr(self) -> str:
        """Its size and options, for `repr`."""
        multiply = f"weight_multiply={self.weight_multiply!r}"
        return f"{self.weight.shape[0]}, eps={self.eps}, {multiply}, dtype={self.weight.dtype}"
