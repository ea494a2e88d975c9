"""Stand-ins for Transformer Engine's norms, and for its modules that begin with one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from automodel_fn.testing._stand_ins_linear import Quantizing, activation_dtype, shaped


class _Normed(Quantizing):
    """A module that normalises its input first, and may return that too."""

    def __init__(
        self, size: int, bias: bool, return_bias: bool, return_layernorm_output: bool
    ) -> None:
        super().__init__(bias, return_bias)
        self.return_layernorm_output = return_layernorm_output
        self.layer_norm_weight = nn.Parameter(torch.empty(size))
        self.layer_norm_bias = nn.Parameter(torch.empty(size))

    def normed(self, inp: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        weight, bias = self.layer_norm_weight.to(dtype), self.layer_norm_bias.to(dtype)
        return F.layer_norm(inp.to(dtype), tuple(weight.shape), weight, bias)

    def with_extras(self, out: torch.Tensor, bias: Any, normed: torch.Tensor) -> Any:
        extras = [bias] if self.return_bias else []
        extras += [normed] if self.return_layernorm_output else []
        return (out, *extras) if extras else out


def layer_norm_linear_stand_in() -> type[Any]:
    """A new `LayerNormLinear`."""

    class LayerNormLinear(_Normed):
        def __init__(
            self,
            in_features: int,
            out_features: int,
            bias: bool = True,
            return_bias: bool = False,
            return_layernorm_output: bool = False,
        ) -> None:
            super().__init__(in_features, bias, return_bias, return_layernorm_output)
            self.in_features, self.out_features = in_features, out_features
            self.add_linear("weight", "bias", (out_features, in_features))
            self.reset_parameters()

        def forward(
            self,
            inp: torch.Tensor,
            is_first_microbatch: bool | None = None,
            fp8_output: bool | None = False,
            fp8_grad: bool | None = False,
        ) -> Any:
            dtype = activation_dtype(inp)
            normed = self.normed(inp, dtype)
            weight = self.quantized("weight", is_first_microbatch, dtype)
            out = shaped(F.linear(normed, weight, self.own_bias("bias", dtype)), inp)
            return self.with_extras(out, self.bias.to(dtype), normed)

    return LayerNormLinear


def layer_norm_mlp_stand_in() -> type[Any]:
    """A new `LayerNormMLP`."""

    class LayerNormMLP(_Normed):
        def __init__(
            self,
            hidden_size: int,
            ffn_hidden_size: int,
            bias: bool = True,
            return_bias: bool = False,
            return_layernorm_output: bool = False,
        ) -> None:
            super().__init__(hidden_size, bias, return_bias, return_layernorm_output)
            self.hidden_size = hidden_size
            self.add_linear("fc1_weight", "fc1_bias", (ffn_hidden_size, hidden_size))
            self.add_linear("fc2_weight", "fc2_bias", (hidden_size, ffn_hidden_size))
            self.reset_parameters()

        def forward(self, inp: torch.Tensor, is_first_microbatch: bool | None = None) -> Any:
            dtype = activation_dtype(inp)
            normed = self.normed(inp, dtype)
            first = self.quantized("fc1_weight", is_first_microbatch, dtype)
            second = self.quantized("fc2_weight", is_first_microbatch, dtype)
            inner = F.gelu(F.linear(normed, first, self.bias_named("fc1_bias", dtype)))
            out = shaped(F.linear(inner, second, self.own_bias("fc2_bias", dtype)), inp)
            return self.with_extras(out, self.bias_named("fc2_bias", dtype), normed)

    return LayerNormMLP


def norm_stand_in(name: str) -> type[Any]:
    """A new `RMSNorm` or `LayerNorm`, whose `forward` is inherited, as Transformer Engine's is."""

    class Operation(nn.Module):
        def __init__(
            self,
            normalized_shape: int,
            eps: float = 1e-5,
            dtype: torch.dtype | None = None,
            device: torch.device | str | None = None,
        ) -> None:
            super().__init__()
            self.eps = eps
            self.weight = nn.Parameter(torch.ones(normalized_shape, dtype=dtype, device=device))
            if name == "LayerNorm":
                self.bias = nn.Parameter(torch.zeros_like(self.weight))

        def reset_parameters(self) -> None:
            nn.init.ones_(self.weight)
            if name == "LayerNorm":
                nn.init.zeros_(self.bias)

        def forward(self, input: torch.Tensor, *extra_inputs: torch.Tensor, **kwargs: Any) -> Any:
            dtype, size = activation_dtype(self.weight), tuple(self.weight.shape)
            inp, weight = input.to(dtype), self.weight.to(dtype)
            if name == "RMSNorm":
                return F.rms_norm(inp, size, weight, self.eps)
            return F.layer_norm(inp, size, weight, self.bias.to(dtype), self.eps)

    return type(name, (Operation,), {})
