"""What made-up models are put together from."""

from __future__ import annotations

from collections.abc import Callable

import attrs
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper


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

    def label(self, tensor: torch.Tensor) -> str:
        """A tensor in words; a number tells which of the made ones it is."""
        known = [*self.parameters, *self.buffers]
        number = next((i for i, other in enumerate(known) if other is tensor), -1)
        traits = [str(tensor.dtype).removeprefix("torch."), str(tuple(tensor.shape))]
        traits += [f"stride {tensor.stride()}"] if not tensor.is_contiguous() else []
        traits += ["requires_grad"] if tensor.requires_grad else []
        traits += ["grad"] if tensor.grad is not None else []
        return f"#{number} {' '.join(traits)}"


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "none": lambda module: module,
    "compile": Compiled,
    "checkpoint": checkpoint_wrapper,
    "data parallel": nn.DataParallel,
}
