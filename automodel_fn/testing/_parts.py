"""What made-up models are put together from."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import attrs
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, weight_norm


class Compiled(nn.Module):
    """Names its module as `torch.compile` does, without the cost of compiling.

    Example:
        >>> [name for name, _ in Compiled(nn.Linear(1, 1, bias=False)).named_parameters()]
        ['_orig_mod.weight']
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._orig_mod = module


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
class Made:
    """What is there to be tied, shared and viewed.

    Example:
        >>> Made(buffers=[torch.zeros(2)]).label(torch.zeros(3))
        '#-1 float32 (3,)'
    """

    parameters: list[nn.Parameter] = attrs.field(factory=list)
    buffers: list[torch.Tensor] = attrs.field(factory=list)
    modules: list[nn.Module] = attrs.field(factory=list)

    def gradients_like(self, data: torch.Tensor) -> list[torch.Tensor]:
        """The gradients that `data` could have as well."""
        grads = [p.grad for p in self.parameters if p.grad is not None]
        return [g for g in grads if g.shape == data.shape and g.dtype == data.dtype]

    def label(self, tensor: torch.Tensor) -> str:
        """A tensor in words; a number tells which of the made ones it is."""
        known = [*self.parameters, *self.buffers]
        number = next((i for i, other in enumerate(known) if other is tensor), -1)
        traits = [str(tensor.dtype).removeprefix("torch."), str(tuple(tensor.shape))]
        traits += [f"stride {tensor.stride()}"] if not tensor.is_contiguous() else []
        traits += ["requires_grad"] if tensor.requires_grad else []
        traits += ["grad"] if tensor.grad is not None else []
        traits += ["marked"] if vars(tensor) else []
        return f"#{number} {' '.join(traits)}"


def mark(parameter: nn.Parameter) -> None:
    """Put on a parameter what users put there: an attribute, and hooks if it is trainable.

    Example:
        >>> weight = nn.Parameter(torch.ones(1))
        >>> mark(weight)
        >>> weight.is_marked
        True
    """
    vars(parameter)["is_marked"] = True
    if parameter.requires_grad:
        parameter.register_hook(_same)
        parameter.register_post_accumulate_grad_hook(_nothing)


def _same(grad: torch.Tensor) -> torch.Tensor:
    return grad


def _nothing(parameter: torch.Tensor) -> None:
    pass


class Sharded(nn.Module):
    """Names its module as FSDP1 does, without a process group.

    Example:
        >>> [name for name, _ in Sharded(nn.Linear(1, 1, bias=False)).named_parameters()]
        ['_fsdp_wrapped_module.weight']
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


class Replicated(DistributedDataParallel):
    """A DistributedDataParallel without a process group: it has the names, and trains nothing.

    Example:
        >>> [name for name, _ in Replicated(nn.Linear(1, 1, bias=False)).named_parameters()]
        ['module.weight']
    """

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module

    def __getstate__(self) -> Any:
        return dict(vars(self))

    def __setstate__(self, state: dict[str, Any]) -> None:
        nn.Module.__setstate__(self, state)


class Tuner(nn.Module):
    """What PEFT puts between its model and the model that it adapts.

    Example:
        >>> [name for name, _ in Tuner(nn.Linear(1, 1, bias=False)).named_parameters()]
        ['model.weight']
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.model = module


class Adapted(nn.Module):
    """Names its module as PEFT does.

    Example:
        >>> [name for name, _ in Adapted(nn.Linear(1, 1, bias=False)).named_parameters()]
        ['base_model.model.weight']
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.base_model = Tuner(module)


class Doubled(nn.Module):
    """A parametrization of one's own.

    Example:
        >>> layer = parametrize.register_parametrization(nn.Linear(1, 1), "weight", Doubled())
        >>> bool(layer.weight == 2 * layer.parametrizations.weight.original)
        True
    """

    def forward(self, original: torch.Tensor) -> torch.Tensor:
        """Twice the original."""
        return original * 2

    def right_inverse(self, value: torch.Tensor) -> torch.Tensor:
        """The original of a value."""
        return value / 2


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda module: module,
    "compile": Compiled,
    "checkpoint": checkpoint_wrapper,
    "data parallel": nn.DataParallel,
    "distributed data parallel": Replicated,
    "fsdp": Sharded,
    "peft": Adapted,
}

PARAMETRIZATIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "custom": lambda module: parametrize.register_parametrization(module, "weight", Doubled()),
    "weight_norm": weight_norm,
    "orthogonal": orthogonal,
}


def parametrized(kind: str) -> nn.Module:
    """A small layer whose weight is parametrized, always with the same values.

    Example:
        >>> [name for name, _ in parametrized("weight_norm").named_parameters()][1]
        'parametrizations.weight.original0'
    """
    layer = nn.Linear(2, 3, device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in layer.parameters():
            values = torch.linspace(-1.001, 1.003, parameter.numel())
            parameter.copy_(values.reshape(parameter.shape))
        return PARAMETRIZATIONS[kind](layer)
