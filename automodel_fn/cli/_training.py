"""The training loop: microbatches, their step contexts, an optimizer step at the end of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager

import attrs
import torch
from torch import nn

from automodel_fn.step._ambient import current_step, step_context
from automodel_fn.step._context import StepContext, accumulate
from automodel_fn.step._sync import gradient_sync

Progress = Callable[[int, float, float], None]
"""Called after each optimizer step with (steps done, loss, tokens a second)."""


@attrs.define
class History:
    """What happened, as far as it has happened: readable at any time, also after Ctrl-C.

    Args:
        losses: Mean loss of each optimizer step.
        expected: The step context of each microbatch.
        seen: What the forwards of each microbatch read, recomputes included.
        num_recompute_reads: How many of these reads were in a recompute.
        seconds: Time spent in the loop.
        num_tokens: Tokens trained on.
    """

    losses: list[float] = attrs.field(factory=list)
    expected: list[StepContext] = attrs.field(factory=list)
    seen: list[list[StepContext]] = attrs.field(factory=list)
    num_recompute_reads: int = 0
    seconds: float = 0.0
    num_tokens: int = 0


def train_steps(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[torch.Tensor],
    num_microbatches: int,
    history: History,
    on_step: Progress,
) -> None:
    """Train on all batches; the history fills as it goes.

    Args:
        model: A causal LM of transformers.
        optimizer: Its optimizer.
        batches: Token numbers [B, S], one microbatch each.
        num_microbatches: Microbatches an optimizer step.
        history: Where to write what happened.
        on_step: Told after every optimizer step.
    """
    model.train()
    start = time.perf_counter()
    total = 0.0
    with _watched(model, history):
        for step, tokens in accumulate(batches, num_microbatches):
            history.expected.append(step)
            history.seen.append([])
            with step_context(step), gradient_sync(model, step):
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                (loss / num_microbatches).backward()
            total += float(loss.detach())
            history.num_tokens += tokens.numel()
            if step.optim_step:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                history.losses.append(total / num_microbatches)
                history.seconds = time.perf_counter() - start
                total = 0.0
                on_step(
                    len(history.losses), history.losses[-1], history.num_tokens / history.seconds
                )


@contextmanager
def _watched(model: nn.Module, history: History) -> Generator[None]:
    """Note which step the forwards of the layers' parts read, in forward and in recompute."""

    def note(module: nn.Module, inputs: object) -> None:
        history.seen[-1].append(current_step())
        history.num_recompute_reads += torch._C._current_graph_task_id() >= 0

    handles = [part.register_forward_pre_hook(note) for part in _parts(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _parts(model: nn.Module) -> list[nn.Module]:
    """The parts of each decoder layer: what an activation checkpoint runs again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    return [part for layer in layers for part in layer.children()] or [model]


@torch.no_grad()
def evaluate(model: nn.Module, tokens: torch.Tensor) -> float:
    """The loss on one batch [B, S], in evaluation mode."""
    was_training = model.training
    model.eval()
    loss = float(model(input_ids=tokens, labels=tokens, use_cache=False).loss)
    model.train(was_training)
    return loss


@torch.no_grad()
def fill_pins(pins: Iterable[torch.Tensor], seed: int) -> None:
    """Give fresh fp32 pins values that bfloat16 cannot hold.

    They start at zero or one, which every dtype holds: keeping those would prove nothing. Each
    element moves by about 1e-3 and has its last mantissa bit set.
    """
    generator = torch.Generator().manual_seed(seed)
    for pin in pins:
        noise = torch.randn(pin.shape, generator=generator) * 1e-3
        pin.add_(noise.to(pin.device))
        pin.view(torch.int32).bitwise_or_(1)
