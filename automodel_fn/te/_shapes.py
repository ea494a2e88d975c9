"""What Transformer Engine's modules return, in shape, dtype and autograd edges, without running.

For an input without values, as in the shape inference of a pipeline, where the kernels cannot run.
The layouts are those of the modules: `[*, in_features]` to `[*, out_features]`, with tensor and
sequence parallelism, and with the tuples that `return_bias` and `return_layernorm_output` give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from automodel_fn.te._unallocated import is_tensor_abstract

Outputs = Any
ShapeRule = Callable[[nn.Module, torch.Tensor], Outputs]


class _Unwritten(torch.autograd.Function):
    """A tensor whose values nobody wrote, with an edge to everything that it would depend on."""

    @staticmethod
    def forward(
        like: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, *sources: torch.Tensor
    ) -> torch.Tensor:
        return like.new_empty(shape, dtype=dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.sources = [
            (tuple(source.shape), source.dtype, source.device, is_tensor_abstract(source))
            for source in inputs[3:]
        ]

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        # A real parameter gets no gradient from values that do not exist.
        grads = (
            grad_outputs[0].new_empty(shape, dtype=dtype, device=device) if is_abstract else None
            for shape, dtype, device, is_abstract in ctx.sources
        )
        return (None, None, None, *grads)


def _unwritten(
    like: torch.Tensor, shape: Iterable[int], dtype: torch.dtype, sources: Iterable[Any]
) -> torch.Tensor:
    tensors = [source for source in sources if isinstance(source, torch.Tensor)]
    if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
        return like.new_empty(tuple(shape), dtype=dtype)
    unwritten: Any = _Unwritten.apply
    return unwritten(like.detach(), tuple(shape), dtype, *tensors)


def activation_dtype(default: torch.dtype) -> torch.dtype:
    """The dtype that Transformer Engine computes in: autocast's, and otherwise the default."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else default


def linear_outputs(module: nn.Module, inp: torch.Tensor) -> Outputs:
    """What `Linear` returns for `inp` of shape `[*, in_features]`."""
    return _linear_outputs(module, inp, None)


def layer_norm_linear_outputs(module: nn.Module, inp: torch.Tensor) -> Outputs:
    """What `LayerNormLinear` returns for `inp` of shape `[*, in_features]`."""
    return _linear_outputs(module, inp, _unwritten(inp, (0,), activation_dtype(inp.dtype), ()))


def grouped_linear_outputs(module: nn.Module, inp: torch.Tensor) -> Outputs:
    """What `GroupedLinear` returns for `inp` of shape `[tokens, in_features]`."""
    dtype = activation_dtype(inp.dtype)
    named = dict(module.named_parameters(recurse=False))
    returns_bias = bool(getattr(module, "return_bias", False))
    sources = [p for name, p in named.items() if not (returns_bias and "bias" in name)]
    out = _unwritten(inp, (*inp.shape[:-1], _int(module, "out_features")), dtype, [inp, *sources])
    if not returns_bias:
        return out
    if "bias" in named:
        return out, _returned_bias(inp, named["bias"].dtype, [named["bias"]])
    biases = (named.get(f"bias{index}") for index in range(_int(module, "num_gemms")))
    return out, [_returned_bias(inp, dtype, [] if bias is None else [bias]) for bias in biases]


def layer_norm_mlp_outputs(module: nn.Module, inp: torch.Tensor) -> Outputs:
    """What `LayerNormMLP` returns for `inp` of shape `[*, hidden]`: the same shape."""
    is_scattered = bool(getattr(module, "set_parallel_mode", False))
    times = _sequence_parallel_size(module) if is_scattered else 1
    return _with_extras(module, inp, _two_dimensional(inp), times, None)


def norm_outputs(module: nn.Module, inp: torch.Tensor) -> Outputs:
    """What `RMSNorm` and `LayerNorm` return: the input's shape, in the dtype of the weight."""
    weight: Any = getattr(module, "weight", None)
    default = weight.dtype if isinstance(weight, torch.Tensor) else inp.dtype
    sources = [inp, *module.parameters(recurse=False)]
    return _unwritten(inp, inp.shape, activation_dtype(default), sources)


def _linear_outputs(module: nn.Module, inp: torch.Tensor, no_bias: Any) -> Outputs:
    """`no_bias` is what is returned for the bias of a module that has none."""
    mode, size = getattr(module, "parallel_mode", None), _sequence_parallel_size(module)
    times, over = (size if mode == side else 1 for side in ("column", "row"))
    rows, *others = _two_dimensional(inp)
    shape = (rows * times // over, *others[:-1], _int(module, "out_features"))
    return _with_extras(module, inp, shape, times, no_bias)


def _with_extras(
    module: nn.Module, inp: torch.Tensor, shape: tuple[int, ...], times: int, no_bias: Any
) -> Outputs:
    """The output, and what is returned beside it; the norm's may be gathered from `times` ranks."""
    dtype = activation_dtype(inp.dtype)
    named = dict(module.named_parameters(recurse=False))
    returns_bias = bool(getattr(module, "return_bias", False))
    biases = {name: p for name, p in named.items() if _is_output_bias(name, named)}
    sources = [inp, *(p for name, p in named.items() if not (returns_bias and name in biases))]
    outputs = [_unwritten(inp, shape, dtype, sources)]
    if returns_bias:
        outputs.append(_returned_bias(inp, dtype, [*biases.values()]) if biases else no_bias)
    if getattr(module, "return_layernorm_output", False):
        is_gathered = getattr(module, "return_layernorm_output_gathered", False) and inp.dim()
        gathered = (inp.shape[0] * times, *inp.shape[1:]) if is_gathered else inp.shape
        outputs.append(_unwritten(inp, gathered, dtype, sources))
    return outputs[0] if len(outputs) == 1 else tuple(outputs)


def _returned_bias(inp: torch.Tensor, dtype: torch.dtype, biases: list[Any]) -> torch.Tensor:
    """A bias that the caller is to add: the parameters, joined, whatever becomes of the input."""
    shape = (sum(bias.shape[0] for bias in biases), *(biases[0].shape[1:] if biases else ()))
    with torch.enable_grad():
        return _unwritten(inp, shape, dtype, biases)


def _is_output_bias(name: str, named: dict[str, Any]) -> bool:
    if "fc2_weight" in named:
        return name == "fc2_bias"
    return "bias" in name and not name.startswith("layer_norm")


def _two_dimensional(inp: torch.Tensor) -> tuple[int, ...]:
    """The shape of the input as it is returned: of at least two dimensions."""
    return tuple(inp.shape) if inp.dim() > 1 else (1, *inp.shape)


def _sequence_parallel_size(module: nn.Module) -> int:
    return _int(module, "tp_size") if getattr(module, "sequence_parallel", False) else 1


def _int(module: nn.Module, name: str) -> int:
    return int(getattr(module, name))


SHAPE_RULES: Mapping[str, ShapeRule] = MappingProxyType(
    {
        "linear": linear_outputs,
        "grouped_linear": grouped_linear_outputs,
        "layer_norm_linear": layer_norm_linear_outputs,
        "layer_norm_mlp": layer_norm_mlp_outputs,
        "rms_norm": norm_outputs,
        "layer_norm": norm_outputs,
    }
)
"""By field of TEClasses; the two composite modules have none."""
