"""A strategy for small models that have everything which a cast can get wrong."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import attrs
import torch
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from automodel_fn.testing._strategies_tensors import CORNERS, corner_tensor, laid_out

_NAMES = ("weight", "bias", "scale", "table")
_CHILDREN = ("linear", "norm", "wo", "word_embeddings", "module")
_KEYWORDS = ("norm", "wo", "bias", "scale", "gate")
_LAYOUTS = ("contiguous", "transposed", "sliced")
_SHAPES = ((3,), (2, 4), (), (0, 2), (17,))
# Mostly what is cast, so that a small model shows what matters.
_DTYPES = (*[torch.float32] * 8, torch.bfloat16, torch.float16, *CORNERS)


class Compiled(nn.Module):
    """Names its module as `torch.compile` does, without the cost of compiling.

    Example:
        >>> [name for name, _ in Compiled(nn.Linear(1, 1, bias=False)).named_parameters()]
        ['_orig_mod.weight']
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


_WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda module: module,
    "compile": Compiled,
    "checkpoint": checkpoint_wrapper,
    "data parallel": nn.DataParallel,
}


class Part(nn.Module):
    """A module of a made-up model; its repr tells how each tensor came to be.

    Example:
        >>> Part()
        Part()
    """

    def __init__(self) -> None:
        super().__init__()
        self.story: dict[str, str] = {}

    def extra_repr(self) -> str:
        """The tensors and the fp32 pins that it declares."""
        pins = [f"{k}={v!r}" for k, v in vars(self).items() if k.startswith("_keep_in_fp32")]
        return ", ".join([*(f"{name}: {text}" for name, text in self.story.items()), *pins])


@attrs.define
class _Made:
    """What is there to be tied, shared and viewed."""

    parameters: list[nn.Parameter] = attrs.field(factory=list)
    buffers: list[torch.Tensor] = attrs.field(factory=list)
    modules: list[nn.Module] = attrs.field(factory=list)

    def label(self, tensor: torch.Tensor) -> str:
        """A tensor in words; a number tells which of the made ones it is."""
        known = [*self.parameters, *self.buffers]
        number = next((i for i, other in enumerate(known) if other is tensor), -1)
        traits = [str(tensor.dtype).removeprefix("torch."), str(tuple(tensor.shape))]
        traits += [f"stride {tensor.stride()}"] if not tensor.is_contiguous() else []
        traits += [w for w in ("requires_grad", "grad") if getattr(tensor, w) not in (False, None)]
        return f"#{number} {' '.join(traits)}"


@st.composite
def models(draw: st.DrawFn) -> nn.Module:
    """Small module trees; the simplest is one module without tensors.

    They have ties across and inside modules, shared buffers, views of one storage (also in two
    dtypes), a module under two names, buffers that are not persistent, None entries, wrappers
    (compile, checkpoint, DataParallel), transposed and sliced strides, all kinds of dtypes,
    trainable and frozen parameters, gradients, and fp32 pins declared by list, tuple or set, on
    the model and on its parts. Values are the corners of each dtype.

    Args:
        draw: Given by hypothesis.

    Example:
        >>> from hypothesis import find
        >>> model = find(models(), lambda m: any(p.grad is not None for p in m.parameters()))
        >>> sum(p.grad is not None for p in model.parameters())
        1
    """
    made = _Made()
    root = _module(draw, made, depth=2)
    wrapper = _WRAPPERS[draw(st.sampled_from(tuple(_WRAPPERS)))]
    return wrapper(root)


def _module(draw: st.DrawFn, made: _Made, depth: int) -> nn.Module:
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


def _child(draw: st.DrawFn, made: _Made, depth: int) -> nn.Module | None:
    kind = draw(st.sampled_from(("new", "new", "wrapped", "again", "none")))
    if kind == "none":
        return None
    if kind == "again" and made.modules:
        return draw(st.sampled_from(made.modules))
    module = _module(draw, made, depth)
    if kind == "wrapped":
        return _WRAPPERS[draw(st.sampled_from(tuple(_WRAPPERS)))](module)
    return module


def _declare(draw: st.DrawFn, module: nn.Module) -> None:
    keywords = draw(st.lists(st.sampled_from(_KEYWORDS), max_size=2, unique=True))
    if not keywords:
        return
    container: Callable[[Sequence[str]], object] = draw(st.sampled_from((list, tuple, set)))
    is_strict = draw(st.booleans())
    attribute = "_keep_in_fp32_modules_strict" if is_strict else "_keep_in_fp32_modules"
    vars(module)[attribute] = container(keywords)


def _data(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(_DTYPES))
    shape = draw(st.sampled_from(_SHAPES))
    start = draw(st.integers(0, len(CORNERS[dtype]) - 1))
    return laid_out(corner_tensor(dtype, shape, start), draw(st.sampled_from(_LAYOUTS)))


def _new_parameter(draw: st.DrawFn, module: nn.Module, name: str, made: _Made) -> torch.Tensor:
    return _register(draw, module, name, _data(draw), made, is_parameter=True)


def _new_buffer(draw: st.DrawFn, module: nn.Module, name: str, made: _Made) -> torch.Tensor:
    return _register(draw, module, name, _data(draw), made, is_parameter=False)


def _register(
    draw: st.DrawFn,
    module: nn.Module,
    name: str,
    data: torch.Tensor,
    made: _Made,
    *,
    is_parameter: bool,
) -> torch.Tensor:
    if not is_parameter:
        module.register_buffer(name, data, persistent=draw(st.booleans()))
        made.buffers.append(data)
        return data
    is_float = data.dtype.is_floating_point or data.dtype.is_complex
    parameter = nn.Parameter(data, requires_grad=is_float and draw(st.booleans()))
    if parameter.requires_grad and draw(st.booleans()):
        parameter.grad = data.detach().clone()
    module.register_parameter(name, parameter)
    made.parameters.append(parameter)
    return parameter


def _tie(draw: st.DrawFn, module: nn.Module, name: str, made: _Made) -> torch.Tensor | None:
    tied = draw(st.sampled_from(made.parameters)) if made.parameters else None
    module.register_parameter(name, tied)
    return tied


def _shared_buffer(
    draw: st.DrawFn, module: nn.Module, name: str, made: _Made
) -> torch.Tensor | None:
    shared = draw(st.sampled_from(made.buffers)) if made.buffers else None
    module.register_buffer(name, shared, persistent=draw(st.booleans()))
    return shared


def _view(draw: st.DrawFn, module: nn.Module, name: str, made: _Made) -> torch.Tensor:
    """Another view of a storage that is there already, or of a new one."""
    known = [t.detach() for t in (*made.parameters, *made.buffers) if t.numel()]
    base = draw(st.sampled_from(known)) if known else _data(draw)
    view = base[..., 1:] if base.dim() and base.shape[-1] > 1 else base.view(base.shape)
    if base.dtype == torch.float32 and draw(st.integers(0, 3)) == 3:
        view = view.view(torch.int32)
    return _register(draw, module, name, view, made, is_parameter=draw(st.booleans()))


def _none(draw: st.DrawFn, module: nn.Module, name: str, made: _Made) -> None:
    if draw(st.booleans()):
        module.register_parameter(name, None)
    else:
        module.register_buffer(name, None)


_SLOTS: dict[str, Callable[[st.DrawFn, nn.Module, str, _Made], torch.Tensor | None]] = {
    "parameter": _new_parameter,
    "buffer": _new_buffer,
    "tie": _tie,
    "shared buffer": _shared_buffer,
    "view": _view,
    "none": _none,
}
