"""Train a model of the benchmark "train-step": losses, and the time of steps."""

from __future__ import annotations

import gc
import itertools
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor, nn

from automodel_fn.bench._observe import gc_paused
from automodel_fn.bench._spec import Case, Measured
from automodel_fn.bench._train_step_text import text_batches
from automodel_fn.bench._train_step_ways import OURS_FP8, PLAIN, Way
from automodel_fn.step._context import accumulate
from automodel_fn.te._cache import cache_counts

DIGITS = 3
"""To how many digits the losses of ours have to be those of the plain model."""

WARM_UP = 3
LEARNING_RATE = 1e-5
_GIB = 2**30
_MOST_WORDS = 300


def agree(one: float, other: float, digits: int) -> bool:
    """Whether a number is another to so many digits: no further than half of the last of them.

    Example:
        >>> agree(6.234, 6.23, 3), agree(6.236, 6.23, 3)
        (True, False)
    """
    last = math.floor(math.log10(abs(other))) - digits + 1
    return abs(one - other) <= 0.5 * 10**last


@attrs.frozen(eq=False)
class Training:
    """A model in training.

    Args:
        model: The model.
        way: Who runs its microbatches.
        optimizer: Its optimizer.
        batches: Microbatches, [1, S] each, as many as all steps take.
        num_microbatches: How many make a step.
    """

    model: nn.Module
    way: Way = attrs.field(kw_only=True)
    optimizer: torch.optim.Optimizer = attrs.field(kw_only=True)
    batches: Sequence[Tensor] = attrs.field(kw_only=True)
    num_microbatches: int = attrs.field(kw_only=True)

    def step(self, index: int) -> list[Tensor]:
        """Make one step, and give the loss of each microbatch."""
        first = index * self.num_microbatches
        batches = self.batches[first : first + self.num_microbatches]
        # Of all labels of the step, as transformers' Trainer counts them: losses add up to a mean.
        num_items = sum(tokens.numel() - len(tokens) for tokens in batches)
        losses: list[Tensor] = []
        for step, tokens in accumulate(batches, self.num_microbatches):
            with self.way.scope(step):
                out: Any = self.model(
                    input_ids=tokens, labels=tokens, use_cache=False, num_items_in_batch=num_items
                )
                out.loss.backward()
            losses.append(out.loss.detach() * self.num_microbatches)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return losses


def training_of(way: Way, case: Case) -> Training:
    """The model of a case, made ready by a way, with its optimizer and its text.

    Args:
        way: Who makes the steps.
        case: The case.
    """
    model = way.prepare(case).train()
    count = case.parameter("microbatches")
    num_steps = case.parameter("loss_steps") + bool(case.parameter("timed_steps")) * (
        WARM_UP + case.parameter("timed_steps")
    )
    return Training(
        model,
        way=way,
        optimizer=torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True),
        batches=text_batches(
            num_steps * count, case.parameter("tokens"), case.parameter("vocabulary"), case.device
        ),
        num_microbatches=count,
    )


def measured_step(way: Way, is_ours: bool, case: Case) -> Measured:
    """The losses and the time of a way's steps on a case; a peer's error is its problem.

    Args:
        way: Who makes the steps.
        is_ours: Whether an error ends the run.
        case: The case; of its steps, "loss_steps" are compared with the plain model's, and then
            "timed_steps" are timed.
    """
    try:
        return _measured(way, case)
    except Exception as error:
        if is_ours:
            raise
        said = str(error).strip().partition("\n")[0][:_MOST_WORDS]
        return Measured((), problem=f"it raised {type(error).__name__}: {said}")


def _measured(way: Way, case: Case) -> Measured:
    way.load()
    plain: list[float] = []
    if case.parameter("loss_steps") and way is not PLAIN:
        plain = _losses(training_of(PLAIN, case), case)
        _free(case)
    training = training_of(way, case)
    losses = _losses(training, case)
    pairs = list(zip(losses, plain, strict=False))
    values: dict[str, float | None] = {
        **_timed(training, case),
        "first_loss_nats": losses[0] if losses else None,
        "last_loss_nats": losses[-1] if losses else None,
        "loss_distance_relative": max((abs(a - b) / b for a, b in pairs), default=None),
    }
    counts = cache_counts(training.model) if way is OURS_FP8 else None
    return Measured(
        values,
        facts={
            "is_loss_of_plain": int(all(agree(*pair, DIGITS) for pair in pairs)) if pairs else None,
            "is_weight_kept": None
            if counts is None
            else int(counts.reused > 0 and counts.refreshed == 0),
        },
    )


def _losses(training: Training, case: Case) -> list[float]:
    """Of each of the first steps the mean over its microbatches."""
    found = [torch.stack(training.step(i)).mean() for i in range(case.parameter("loss_steps"))]
    return [float(loss) for loss in found]


def _timed(training: Training, case: Case) -> Mapping[str, float | None]:
    """Steps after those of the losses, one after another, as in training."""
    timed, first = case.parameter("timed_steps"), case.parameter("loss_steps")
    if not timed:
        return {}
    is_cuda = case.device == "cuda"
    for index in range(first, first + WARM_UP):
        training.step(index)
    gc.collect()
    if is_cuda:
        torch.cuda.reset_peak_memory_stats()
    returned: list[float] = []
    ends: list[Any] = [_mark(case)]
    with gc_paused():
        for index in range(first + WARM_UP, first + WARM_UP + timed):
            start = time.perf_counter()
            training.step(index)
            returned.append((time.perf_counter() - start) * 1e3)
            ends.append(_mark(case))
    step_ms = statistics.median(_between(*pair) for pair in itertools.pairwise(ends))
    return {
        "step_ms": step_ms,
        "throughput_tps": training.num_microbatches * case.parameter("tokens") / step_ms * 1e3,
        "peak_gib": torch.cuda.max_memory_allocated() / _GIB if is_cuda else None,
        "host_ms": statistics.median(returned) if is_cuda else None,
    }


def _mark(case: Case) -> Any:
    """This moment of the device, or of the CPU, where nothing is left to be done after a call."""
    if case.device != "cuda":
        return time.perf_counter()
    mark = torch.cuda.Event(enable_timing=True)
    mark.record()
    return mark


def _between(start: Any, end: Any) -> float:
    """Milliseconds."""
    if isinstance(start, float):
        return (end - start) * 1e3
    end.synchronize()
    return start.elapsed_time(end)


def _free(case: Case) -> None:
    gc.collect()
    if case.device == "cuda":
        torch.cuda.empty_cache()
