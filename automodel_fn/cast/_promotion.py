"""Which fp32 pins need a boundary: their owner does not deal with mixed dtypes by itself.

Decided by trying, not by a list of classes. The owner of a pin is copied to the meta device (no
data, no hooks) twice: once as if nothing were pinned, once with its pins. If the first runs on an
activation of the target dtype and the second fails or returns another dtype, the pin would break
or promote what comes after it. Where neither runs (a forward that takes more than an activation),
nothing can be said, and nothing is.
"""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from automodel_fn.cast._entries import KEEP, TensorCast
from automodel_fn.cast._tensors import ModelScan
from automodel_fn.dtypes import dtype_name
from automodel_fn.fqn import owner_of

_MAX_WIDTHS = 8
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


@attrs.frozen
class BoundaryOwner:
    """A module whose fp32 pins need a boundary.

    Args:
        name: Its FQN.
        module: The module.
        compute_dtype: The dtype that comes in and has to go out.
        found: What it does without a boundary, in words.
    """

    name: str
    module: nn.Module = attrs.field(kw_only=True, eq=False, repr=False)
    compute_dtype: torch.dtype = attrs.field(kw_only=True)
    found: str = attrs.field(kw_only=True)

    def note(self) -> str:
        """The owner in words."""
        return (
            f"the fp32 pins of {self.name!r} ({type(self.module).__name__}) need "
            f"fp32_boundaries(model, plan): given {dtype_name(self.compute_dtype)} it {self.found}"
        )


def boundary_owners(
    model_scan: ModelScan, entries: Sequence[TensorCast], dtype: torch.dtype | None
) -> tuple[BoundaryOwner, ...]:
    """The owners of fp32 pins that do not deal with activations of `dtype` by themselves."""
    if dtype is None or dtype == torch.float32:
        return ()
    pinned: defaultdict[str, set[str]] = defaultdict(set)
    for entry in entries:
        if entry.action == KEEP:
            for name in entry.names:
                pinned[owner_of(name)].add(name)
    verdicts: dict[Any, str | None] = {}
    owners: dict[int, BoundaryOwner] = {}
    for name, _, module in model_scan.modules:
        if name not in pinned or id(module) in owners:
            continue
        keys = frozenset(pin.rpartition(".")[2] for pin in pinned[name])
        signature = _signature(module, keys)
        if signature not in verdicts:
            verdicts[signature] = _verdict(module, keys, dtype)
        found = verdicts[signature]
        if found is not None:
            owner = BoundaryOwner(name, module=module, compute_dtype=dtype, found=found)
            owners[id(module)] = owner
    return tuple(owners.values())


def _signature(module: nn.Module, keys: frozenset[str]) -> Any:
    """Modules that agree in this need one trial: class, settings, shapes, pins."""
    plain = (str, int, float, bool, type(None))
    settings = tuple((k, v) for k, v in sorted(vars(module).items()) if isinstance(v, plain))
    tensors = tuple((k, tuple(t.shape), t.dtype) for k, t in module.named_parameters())
    buffers = tuple((k, tuple(t.shape), t.dtype) for k, t in module.named_buffers())
    return type(module), settings, tensors, buffers, keys


def _verdict(module: nn.Module, keys: frozenset[str], dtype: torch.dtype) -> str | None:
    if sum(1 for _ in module.modules()) > 64:
        return None
    for activation in _activations(module, dtype):
        wanted = _output_dtypes(module, frozenset(), dtype, activation)
        if not wanted:
            continue
        got = _output_dtypes(module, keys, dtype, activation)
        if got == wanted:
            return None
        if not got:
            return "fails"
        return f"returns {', '.join(dtype_name(d) for d in got)}"
    return None


def _activations(module: nn.Module, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """Activations that the module might take: as wide as one of its tensors, and token numbers."""
    tensors = [*module.parameters(), *module.buffers()]
    widths = dict.fromkeys(size for t in tensors for size in reversed(t.shape))
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        yield torch.empty(1, 2, dtype=torch.long, device="meta")
    for width in list(widths)[:_MAX_WIDTHS]:
        yield torch.empty(1, 2, width, dtype=dtype, device="meta")
        for dims in (3, 4, 5):
            yield torch.empty(1, width, *(8,) * (dims - 2), dtype=dtype, device="meta")


def _output_dtypes(
    module: nn.Module, keys: frozenset[str], dtype: torch.dtype, activation: torch.Tensor
) -> tuple[torch.dtype, ...]:
    """The floating dtypes that the module returns, or () if it does not run."""
    try:
        trial = _on_meta(module, keys, dtype)
        with torch.no_grad(), _RefuseMixedDtypes(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = type(trial).forward(trial, activation)
    except Exception:  # noqa: BLE001 - user code on a guessed input: any failure means "cannot say"
        return ()
    return tuple(t.dtype for t in _tensors_in(output) if t.is_floating_point())


class _RefuseMixedDtypes(TorchDispatchMode):
    """Fail where a real device would: a matrix product of two dtypes."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func._schema.name in _SAME_DTYPE_OPS:
            floats = [t for t in _tensors_in((args, kwargs)) if t.is_floating_point()]
            if len({t.dtype for t in floats}) > 1:
                raise TypeError(f"{func._schema.name} of several dtypes")
        return func(*args, **kwargs)


def _tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():  # pyright: ignore[reportUnknownVariableType]
            yield from _tensors_in(item)
    elif isinstance(value, list | tuple):
        for item in value:  # pyright: ignore[reportUnknownVariableType]
            yield from _tensors_in(item)


def _on_meta(module: nn.Module, keys: frozenset[str], dtype: torch.dtype) -> nn.Module:
    """A copy whose tensors are on meta: `keys` in float32, other castable ones in `dtype`."""
    memo: dict[int, Any] = {}
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        stored = tensor.dtype
        if name in keys:
            stored = torch.float32
        elif stored in (torch.float32, torch.float16, torch.bfloat16):
            stored = dtype
        twin = torch.empty(tensor.shape, dtype=stored, device="meta")
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(twin, requires_grad=False) if is_parameter else twin
    return copy.deepcopy(module, memo)
