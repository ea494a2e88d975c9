"""A strategy for small models that have everything which a cast can get wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from hypothesis import strategies as st
from torch import nn

from automodel_fn.testing._parts import (
    PARAMETRIZATIONS,
    WRAPPERS,
    Made,
    Part,
    mark,
    parametrized,
)
from automodel_fn.testing._strategies_tensors import CORNERS, corner_tensor, laid_out

_NAMES = ("weight", "bias", "scale", "table")
_CHILDREN = ("linear", "norm", "wo", "word_embeddings", "module", "base_model", "model")
# The last two tell the name of a parametrization's original from that of what it stands for.
_KEYWORDS = ("norm", "wo", "bias", "scale", "gate", "linear.weight", "parametrizations")
_CONTAINERS: tuple[Callable[[Sequence[str]], object], ...] = (list, tuple, set, frozenset)
_DECLARATIONS = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
_LAYOUTS = ("contiguous", "transposed", "sliced", "channels_last", "expanded")
_SHAPES = ((3,), (2, 4), (), (0, 2), (17,), (2, 2, 1, 3))
# Mostly what is cast, so that a small model shows what matters.
_DTYPES = (*[torch.float32] * 8, torch.bfloat16, torch.float16, *CORNERS)


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """Small module trees; the simplest is one module without tensors.

    They have ties across and inside modules, shared buffers (also with a parameter), views of one
    storage (also in two dtypes), a module under two names, buffers that are not persistent, None
    entries, parametrizations, wrappers (compile, checkpoint, DataParallel, DDP, FSDP1, PEFT) and
    children with such names, transposed, sliced, expanded and channels-last strides, all kinds of
    dtypes, trainable and frozen tensors, gradients (also one for two parameters), hooks and Python
    attributes on tensors, and overlapping fp32 pins declared by list, tuple or set, on the model
    and on its parts. Values are the corners of each dtype.

    Args:
        draw: Given by hypothesis.

    Example:
        >>> from hypothesis import find
        >>> model = find(models(), lambda m: any(p.grad is not None for p in m.parameters()))
        >>> sum(p.grad is not None for p in model.parameters())
        1
    """
    made = Made()
    root = _module(draw, made, depth=2)
    wrapper = WRAPPERS[draw(st.sampled_from(tuple(WRAPPERS)))]
    return wrapper(root)


def _module(draw: st.DrawFn, made: Made, depth: int) -> nn.Module:
    module = Part()
    for name in _NAMES[: draw(st.integers(0, len(_NAMES)))]:
        kind = draw(st.sampled_from(tuple(_SLOTS)))
        tensor = _SLOTS[kind](draw, module, name, made)
        module.story[name] = kind if tensor is None else f"{kind} {made.label(tensor)}"
    _declare(draw, module)
    if depth:
        for name in draw(st.lists(st.sampled_from(_CHILDREN), max_size=2, unique=True)):
            module.add_module(name, _child(draw, made, depth - 1))
    made.modules.append(module)
    return module


def _child(draw: st.DrawFn, made: Made, depth: int) -> nn.Module | None:
    kind = draw(st.sampled_from(("new", "new", "wrapped", "again", "parametrized", "none")))
    if kind == "none":
        return None
    if kind == "parametrized":
        return parametrized(draw(st.sampled_from(tuple(PARAMETRIZATIONS))))
    if kind == "again" and made.modules:
        return draw(st.sampled_from(made.modules))
    module = _module(draw, made, depth)
    if kind == "wrapped":
        return WRAPPERS[draw(st.sampled_from(tuple(WRAPPERS)))](module)
    return module


def _declare(draw: st.DrawFn, module: nn.Module) -> None:
    for attribute in draw(st.lists(st.sampled_from(_DECLARATIONS), max_size=2, unique=True)):
        keywords = draw(st.lists(st.sampled_from(_KEYWORDS), min_size=1, max_size=2, unique=True))
        vars(module)[attribute] = draw(st.sampled_from(_CONTAINERS))(keywords)


def _data(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(_DTYPES))
    shape = draw(st.sampled_from(_SHAPES))
    start = draw(st.integers(0, len(CORNERS[dtype]) - 1))
    return laid_out(corner_tensor(dtype, shape, start), draw(st.sampled_from(_LAYOUTS)))


def _new_parameter(draw: st.DrawFn, module: nn.Module, name: str, made: Made) -> torch.Tensor:
    return _register(draw, module, name, _data(draw), made, is_parameter=True)


def _new_buffer(draw: st.DrawFn, module: nn.Module, name: str, made: Made) -> torch.Tensor:
    return _register(draw, module, name, _data(draw), made, is_parameter=False)


def _register(
    draw: st.DrawFn,
    module: nn.Module,
    name: str,
    data: torch.Tensor,
    made: Made,
    *,
    is_parameter: bool,
) -> torch.Tensor:
    is_trainable = (data.dtype.is_floating_point or data.dtype.is_complex) and draw(st.booleans())
    if not is_parameter:
        data = data.detach().requires_grad_(is_trainable and draw(st.integers(0, 3)) == 3)
        module.register_buffer(name, data, persistent=draw(st.booleans()))
        made.buffers.append(data)
        return data
    parameter = nn.Parameter(data, requires_grad=is_trainable)
    if is_trainable and draw(st.booleans()):
        parameter.grad = draw(st.sampled_from((data.detach().clone(), *made.gradients_like(data))))
    if draw(st.integers(0, 3)) == 3:
        mark(parameter)
    module.register_parameter(name, parameter)
    made.parameters.append(parameter)
    return parameter


def _tie(draw: st.DrawFn, module: nn.Module, name: str, made: Made) -> torch.Tensor | None:
    tied = draw(st.sampled_from(made.parameters)) if made.parameters else None
    module.register_parameter(name, tied)
    return tied


def _shared_buffer(
    draw: st.DrawFn, module: nn.Module, name: str, made: Made
) -> torch.Tensor | None:
    known = [*made.buffers, *made.parameters]
    shared = draw(st.sampled_from(known)) if known else None
    module.register_buffer(name, shared, persistent=draw(st.booleans()))
    return shared


def _view(draw: st.DrawFn, module: nn.Module, name: str, made: Made) -> torch.Tensor:
    """Another view of a storage that is there already, or of a new one."""
    known = [t.detach() for t in (*made.parameters, *made.buffers) if t.numel()]
    base = draw(st.sampled_from(known)) if known else _data(draw)
    view = base[..., 1:] if base.dim() and base.shape[-1] > 1 else base.view(base.shape)
    if base.dtype == torch.float32 and draw(st.integers(0, 3)) == 3:
        view = view.view(torch.int32)
    return _register(draw, module, name, view, made, is_parameter=draw(st.booleans()))


def _none(draw: st.DrawFn, module: nn.Module, name: str, made: Made) -> None:
    if draw(st.booleans()):
        module.register_parameter(name, None)
    else:
        module.register_buffer(name, None)


_SLOTS: dict[str, Callable[[st.DrawFn, nn.Module, str, Made], torch.Tensor | None]] = {
    "parameter": _new_parameter,
    "buffer": _new_buffer,
    "tie": _tie,
    "shared buffer": _shared_buffer,
    "view": _view,
    "none": _none,
}
