"""Stand-ins for Transformer Engine's linear layers, and what keeps a quantized weight."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


class Quantizing(nn.Module):
    """A module with weights that are used quantized, by Transformer Engine's rule."""

    def __init__(self, bias: bool, return_bias: bool) -> None:
        super().__init__()
        self.use_bias, self.return_bias = bias, return_bias
        self.num_quantizations = 0
        self._fp8_workspaces: dict[str, torch.Tensor] = {}

    def quantized(
        self, name: str, is_first_microbatch: bool | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """The weight of that name, rounded to float8 and back, or the one that was kept."""
        weight = getattr(self, name)
        rounded = self._fp8_workspaces.get(name) if is_first_microbatch is False else None
        if rounded is None:
            # Not where it is compiled: there it would be a constant, and compiled anew each time.
            self.num_quantizations += not torch.compiler.is_compiling()
            rounded = weight.detach().to(torch.float8_e4m3fn).to(weight.dtype)
        if is_first_microbatch is not None:
            self._fp8_workspaces[name] = rounded
        # The value is the rounded one, bit for bit; the gradient goes to the weight.
        return (rounded + (weight - weight.detach())).to(dtype)

    def own_bias(self, name: str, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias that is added here: None where there is none, or where the caller adds it."""
        added = self.use_bias and not self.return_bias
        return getattr(self, name).to(dtype) if added else None

    def bias_named(self, name: str, dtype: torch.dtype) -> torch.Tensor | None:
        """The bias to give back to the caller; None where there is none."""
        return getattr(self, name).to(dtype) if self.use_bias else None

    def add_linear(
        self,
        weight: str,
        bias: str,
        sizes: tuple[int, int],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add a weight `[out, in]` and a bias, both unfilled; one that is none is empty."""
        setattr(self, weight, nn.Parameter(torch.empty(sizes, dtype=dtype, device=device)))
        size = sizes[0] if self.use_bias else 0
        made = torch.empty(size, dtype=dtype, device=device)
        setattr(self, bias, nn.Parameter(made) if self.use_bias else made)

    def reset_parameters(self) -> None:
        """As Transformer Engine does: normal weights, and biases of 0."""
        for name, parameter in self.named_parameters():
            if "bias" in name:
                nn.init.zeros_(parameter)
            elif "layer_norm" in name:
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.023)


def activation_dtype(inp: torch.Tensor) -> torch.dtype:
    """The dtype that is computed in, and returned."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else inp.dtype


def shaped(out: torch.Tensor, inp: torch.Tensor) -> torch.Tensor:
    """The output as Transformer Engine shapes it: never with fewer than two dimensions."""
    return out.view(-1, *inp.shape[1:-1], out.shape[-1])


def linear_stand_in() -> type[Any]:
    """A new `Linear`."""

    class Linear(Quantizing):
        def __init__(
            self,
            in_features: int,
            out_features: int,
            bias: bool = True,
            return_bias: bool = False,
            params_dtype: torch.dtype | None = None,
            device: torch.device | str | None = None,
        ) -> None:
            super().__init__(bias, return_bias)
            self.in_features, self.out_features = in_features, out_features
            sizes = out_features, in_features
            self.add_linear("weight", "bias", sizes, params_dtype, device)
            self.reset_parameters()

        def forward(
            self,
            inp: torch.Tensor,
            is_first_microbatch: bool | None = None,
            fp8_output: bool | None = False,
            fp8_grad: bool | None = False,
        ) -> Any:
            dtype = activation_dtype(inp)
            weight = self.quantized("weight", is_first_microbatch, dtype)
            out = shaped(F.linear(inp.to(dtype), weight, self.own_bias("bias", dtype)), inp)
            return (out, self.bias_named("bias", dtype)) if self.return_bias else out

    return Linear


def grouped_linear_stand_in() -> type[Any]:
    """A new `GroupedLinear`."""

    class GroupedLinear(Quantizing):
        def __init__(
            self,
            num_gemms: int,
            in_features: int,
            out_features: int,
            bias: bool = True,
            return_bias: bool = False,
            params_dtype: torch.dtype | None = None,
            device: torch.device | str | None = None,
        ) -> None:
            super().__init__(bias, return_bias)
            self.num_gemms, self.out_features = num_gemms, out_features
            for index in range(num_gemms):
                sizes = out_features, in_features
                self.add_linear(f"weight{index}", f"bias{index}", sizes, params_dtype, device)
            self.reset_parameters()

        def forward(
            self,
            inp: torch.Tensor,
            m_splits: torch.Tensor,
            is_first_microbatch: bool | None = None,
            out: torch.Tensor | None = None,
            dgrad_out: torch.Tensor | None = None,
        ) -> Any:
            dtype = activation_dtype(inp)
            made = [
                F.linear(
                    part.to(dtype),
                    self.quantized(f"weight{index}", is_first_microbatch, dtype),
                    self.own_bias(f"bias{index}", dtype),
                )
                for index, part in enumerate(inp.split([int(rows) for rows in m_splits]))
            ]
            result = torch.cat(made) if out is None else out.copy_(torch.cat(made))
            if not self.return_bias:
                return result
            return result, [getattr(self, f"bias{i}").to(dtype) for i in range(self.num_gemms)]

    return GroupedLinear
