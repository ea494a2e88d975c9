"""Trying a module's forward without data: copies of it, and activations that it might take."""

from __future__ import annotations

import inspect
import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_fn.cast._fsdp import copied_without_fsdp

_MAX_WIDTHS = 8
_CASTABLE = (torch.float32, torch.float16, torch.bfloat16)
_SAME_DTYPE_OPS = frozenset(
    {
        "aten::mm",
        "aten::addmm",
        "aten::bmm",
        "aten::baddbmm",
        "aten::mv",
        "aten::dot",
        "aten::convolution",
        "aten::native_layer_norm",
        "aten::native_group_norm",
    }
)
"""Operators that want one floating dtype on a GPU; on the meta device they do not check."""


def is_small(module: nn.Module, most: int) -> bool:
    """Whether a module has at most so many modules, itself included."""
    if not module._modules:
        return most > 0
    return sum(1 for _ in islice(module.modules(), most + 1)) <= most


def tensors_of(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Its parameters and buffers by name, each once."""
    if module._modules:
        yield from module.named_parameters()
        yield from module.named_buffers()
        return
    # PyTorch's own walk of a module without children takes almost three times as long.
    for held in (module._parameters, module._buffers):
        seen: set[int] = set()
        for name, tensor in held.items():
            if tensor is not None and id(tensor) not in seen:
                seen.add(id(tensor))
                yield name, tensor


def modules_of(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """It and the modules in it by name, each once."""
    return module.named_modules() if module._modules else iter((("", module),))


def signature(module: nn.Module, keys: frozenset[str]) -> Any:
    """Modules that agree in this need one trial: classes, settings, shapes, pins."""
    plain = (str, int, float, bool, type(None))
    settings = tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, plain))
    inside = tuple((name, type(child)) for name, child in modules_of(module))
    tensors = tuple((k, tuple(t.shape), t.dtype) for k, t in tensors_of(module))
    return settings, inside, tensors, keys


def activations(module: nn.Module, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Activations that the module might take: as wide as one of its tensors, and token numbers."""
    widths = dict.fromkeys(size for _, t in tensors_of(module) for size in reversed(t.shape))
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield torch.empty(1, 2, dtype=torch.long, device="meta")
    for width in list(widths)[:_MAX_WIDTHS]:
        yield torch.empty(1, 2, width, dtype=dtype, device="meta")
        for dims in (3, 4, 5):
            yield torch.empty(1, width, *(8,) * (dims - 2), dtype=dtype, device="meta")


def twin(
    module: nn.Module,
    keys: Iterable[str],
    dtype: torch.dtype,
    dress: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> nn.Module | None:
    """A copy whose tensors are on meta: `keys` in float32, other castable ones in `dtype`.

    It has no hooks, and the forward of its class; `dress` makes something of each new tensor. None
    if the module cannot be copied.
    """
    pinned = frozenset(keys)
    memo: dict[int, Any] = {}
    for name, tensor in tensors_of(module):
        stored = tensor.dtype
        if name in pinned:
            stored = torch.float32
        elif stored in _CASTABLE:
            stored = dtype
        memo[id(tensor)] = _on_meta(tensor, stored, dress)
    for child in module.modules():
        for tensor in _unregistered(child):
            memo.setdefault(id(tensor), _on_meta(tensor, tensor.dtype, dress))
        for name, value in vars(child).items():
            if name.endswith(("_hooks", "_hooks_with_kwargs", "_hooks_always_called")):
                memo[id(value)] = OrderedDict()
            elif name == "forward":
                memo[id(value)] = type(child).forward
    try:
        copied = copied_without_fsdp(module, memo)
    except Exception:  # noqa: BLE001 - what a user's module refuses to copy cannot be tried
        return None
    for child in copied.modules():
        vars(child).pop("forward", None)
    return copied


def _on_meta(
    tensor: torch.Tensor, dtype: torch.dtype, dress: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    new = dress(torch.empty(tensor.shape, dtype=dtype, device="meta"))
    return nn.Parameter(new, requires_grad=False) if isinstance(tensor, nn.Parameter) else new


def _unregistered(module: nn.Module) -> Iterator[torch.Tensor]:
    """Tensors that a module has as attributes, or in a list or dict of them: caches, tables.

    Without scalars, which a forward may read, and which take no memory.
    """
    for value in vars(module).values():
        inside = value.values() if isinstance(value, dict) else value
        for item in inside if isinstance(value, dict | list | tuple) else (value,):
            if type(item) in (torch.Tensor, nn.Parameter) and item.dim():
                yield item


def takes_an_activation(module: nn.Module) -> bool:
    """Whether its forward can be called with one argument."""
    try:
        inspect.signature(type(module).forward).bind(module, None)
    except (TypeError, ValueError):
        return False
    return True


def output_dtypes(trial: nn.Module | None, activation: torch.Tensor) -> tuple[torch.dtype, ...]:
    """The floating dtypes that a copy of a module returns, or () if it does not run."""
    if trial is None:
        return ()
    try:
        with without_traces(), _RefuseMixedDtypes():
            output = type(trial).forward(trial, activation)
    except Exception:  # noqa: BLE001 - user code on a guessed input: any failure means "cannot say"
        return ()
    return tuple(t.dtype for t in tensors_in(output) if t.is_floating_point())


@contextmanager
def without_traces() -> Generator[None]:
    """Run user code without gradients and warnings, and as if no random number was drawn.

    It draws the same ones each time and has the same default dtype, so that one module gives one
    answer.
    """
    numpy = getattr(sys.modules.get("numpy"), "random", None)
    drawn, drawn_by_numpy = random.getstate(), numpy.get_state() if numpy else None
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float32)
        with torch.no_grad(), torch.random.fork_rng(devices=()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.default_generator.manual_seed(0)
            random.seed(0)
            if numpy:
                numpy.seed(0)
            yield
    finally:
        torch.set_default_dtype(default)
        random.setstate(drawn)
        if numpy:
            numpy.set_state(drawn_by_numpy)


class _RefuseMixedDtypes(TorchDispatchMode):
    """Fail where a real device would: a matrix product of two dtypes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in _SAME_DTYPE_OPS:
            floats = [t for t in tensors_in((args, kwargs)) if t.is_floating_point()]
            if len({t.dtype for t in floats}) > 1:
                raise TypeError(f"{func._schema.name} of several dtypes")
        return func(*args, **kwargs)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors in nested dicts, lists and tuples."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():  # pyright: ignore[reportUnknownVariableType]
            yield from tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from tensors_in(item)
