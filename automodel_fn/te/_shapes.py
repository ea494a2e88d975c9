"""What Transformer Engine's modules return, in shape, dtype and autograd edges, without running.

For an input without memory, as in the shape inference of a pipeline, where the kernels cannot run.
The layouts are those of the modules: `[*, in_features]` to `[*, out_features]`, with tensor and
sequence parallelism, and with the tuples that `return_bias` and `return_layernorm_output` give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from automodel_fn.te._unallocated import is_tensor_unallocated

Outputs = Any
ShapeRule = Callable[[nn.Module, torch.Tensor], Outputs]


class _Unwritten(torch.autograd.Function):
    """A tensor whose values nobody wrote, with an edge to everything that it would depend on."""

    @staticmethod
    def forward(shape: tuple[int, ...], dtype: torch.dtype, *sources: torch.Tensor) -> torch.Tensor:
        return sources[0].new_empty(shape, dtype=dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.sources = [
            (tuple(source.shape), source.dtype, is_tensor_unallocated(source))
            for source in inputs[2:]
        ]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        # A real parameter gets no gradient from values that do not exist.
        grads = (
            grad_outputs[0].new_empty(shape, dtype=dtype) if unallocated else None
            for shape, dtype, unallocated in ctx.sources
        )
        return (None, None, *grads)


def _unwritten(
    shape: Iterable[int], dtype: torch.dtype, inp: torch.Tensor, parameters: Iterable[Any]
) -> torch.Tensor:
    sources = [inp, *(p for p in parameters if isinstance(p, torch.Tensor))]
    unwritten: Any = _Unwritten.apply
    return unwritten(tuple(shape), dtype, *sources)


def activation_dtype(default: torch.dtype) -> torch.dtype:
    """The dtype that Transformer Engine computes in: autocast's, and otherwise the default."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else default


def linear_outputs(module: nn.Module, inp: torch.Tensor) -> Outputs:
    """What `Linear` and `LayerNormLinear` return for `inp` of shape `[*, in_features]`."""
    leading = _gathered(module, inp, "column")
    leading = _scattered(module, leading, "row")
    return _with_extras(module, inp, (*leading, _out_features(module)))


def grouped_linear_outputs(module: nn.Module, inp: torch.Tensor) -> Outputs:
    """What `GroupedLinear` returns for `inp` of shape `[tokens, in_features]`."""
    shape = (*inp.shape[:-1], _out_features(module))
    dtype = activation_dtype(inp.dtype)
    out = _unwritten(shape, dtype, inp, module.parameters(recurse=False))
    if not getattr(module, "return_bias", False):
        return out
    biases = [p for name, p in module.named_parameters(recurse=False) if "bias" in name]
    return out, [_unwritten(bias.shape, dtype, inp, (bias,)) for bias in biases]


def layer_norm_mlp_outputs(module: nn.Module, inp: torch.Tensor) -> Outputs:
    """What `LayerNormMLP` returns for `inp` of shape `[*, hidden]`: the same shape."""
    return _with_extras(module, inp, tuple(inp.shape))


def norm_outputs(module: nn.Module, inp: torch.Tensor) -> Outputs:
    """What `RMSNorm` and `LayerNorm` return: the input's shape, in the dtype of the weight."""
    weight: Any = getattr(module, "weight", None)
    default = weight.dtype if isinstance(weight, torch.Tensor) else inp.dtype
    return _unwritten(inp.shape, activation_dtype(default), inp, module.parameters(recurse=False))


def _with_extras(module: nn.Module, inp: torch.Tensor, shape: tuple[int, ...]) -> Outputs:
    dtype = activation_dtype(inp.dtype)
    named = dict(module.named_parameters(recurse=False))
    outputs = [_unwritten(shape, dtype, inp, named.values())]
    if getattr(module, "return_bias", False):
        biases = [p for name, p in named.items() if _is_output_bias(name, named)]
        outputs.append(_unwritten((shape[-1],), dtype, inp, biases))
    if getattr(module, "return_layernorm_output", False):
        is_gathered = getattr(module, "return_layernorm_output_gathered", False)
        leading = _gathered(module, inp, "column") if is_gathered else tuple(inp.shape[:-1])
        norm = [p for name, p in named.items() if name.startswith("layer_norm")]
        outputs.append(_unwritten((*leading, inp.shape[-1]), dtype, inp, norm))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _is_output_bias(name: str, named: dict[str, Any]) -> bool:
    if "fc2_bias" in named:
        return name == "fc2_bias"
    return "bias" in name and not name.startswith("layer_norm")


def _out_features(module: nn.Module) -> int:
    return int(getattr(module, "out_features"))  # noqa: B009 - typed as a parameter otherwise


def _gathered(module: nn.Module, inp: torch.Tensor, mode: str) -> tuple[int, ...]:
    """The leading dimensions of a sequence-parallel input after the all-gather of `mode`."""
    leading = tuple(inp.shape[:-1])
    return _scaled(leading, _sequence_parallel_size(module, mode), 1)


def _scattered(module: nn.Module, leading: tuple[int, ...], mode: str) -> tuple[int, ...]:
    return _scaled(leading, 1, _sequence_parallel_size(module, mode))


def _scaled(leading: tuple[int, ...], times: int, over: int) -> tuple[int, ...]:
    return (leading[0] * times // over, *leading[1:]) if leading else leading


def _sequence_parallel_size(module: nn.Module, mode: str) -> int:
    if not getattr(module, "sequence_parallel", False):
        return 1
    is_of_mode = getattr(module, "parallel_mode", None) == mode
    return int(getattr(module, "tp_size", 1)) if is_of_mode else 1


SHAPE_RULES: Mapping[str, ShapeRule] = MappingProxyType(
    {
        "linear": linear_outputs,
        "grouped_linear": grouped_linear_outputs,
        "layer_norm_linear": linear_outputs,
        "layer_norm_mlp": layer_norm_mlp_outputs,
        "rms_norm": norm_outputs,
        "layer_norm": norm_outputs,
    }
)
"""By field of TEClasses; the two composite modules have none."""
