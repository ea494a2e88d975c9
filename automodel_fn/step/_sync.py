"""Hold gradient synchronization back until the microbatch before the optimizer step."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager

from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from automodel_fn.errors import ConfigError
from automodel_fn.step._context import StepContext


@contextmanager
def gradient_sync(model: nn.Module, step: StepContext) -> Generator[None]:
    """Run forward and backward of one microbatch; gradients are synchronized at `optim_step` only.

    Covers DDP (`no_sync`) and FSDP2 (`set_requires_gradient_sync`), whether `model` is wrapped
    itself or has wrapped modules inside; for any other model it changes nothing. Afterwards, also
    after an error, synchronization is on again. Both forward and backward belong inside: DDP
    decides in the forward. Replaces `enable_fsdp_optimizations` and the flag `IS_OPTIM_STEP` (NeMo
    Automodel).

    A stage of `torch.distributed.pipelining` whose module is sharded as a whole decides for itself,
    and reduces at the end of each schedule step; one of whose module only parts are sharded is held
    back as any other model.

    Args:
        model: The model, wrapped or not.
        step: The step of this microbatch, as `accumulate` gives it.

    Raises:
        ConfigError: `step` is no StepContext.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 2)
        >>> with gradient_sync(model, StepContext(optim_step=True)):
        ...     model(torch.ones(1, 2)).sum().backward()
    """
    if not isinstance(step, StepContext):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"step={step!r} must be a StepContext, as accumulate gives it.")
    if step.optim_step:
        yield
        return
    with ExitStack() as held:
        for module in model.modules():
            if isinstance(module, DistributedDataParallel):
                held.enter_context(module.no_sync())
            elif isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(False, recurse=False)
                held.callback(module.set_requires_gradient_sync, True, recurse=False)
        yield
