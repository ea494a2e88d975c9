"""The loss of a language model's head in the benchmark "ops": products, softmax, cross entropy.

Shapes: T tokens, H hidden, V the vocabulary.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from torch.nn import functional

from automodel_fn.bench._device_time import Call
from automodel_fn.bench._ops_products import head_products
from automodel_fn.bench._ops_spec import (
    LIGER,
    OURS,
    TORCH,
    TORCH_CHUNKED,
    Exact,
    Inputs,
    Op,
    random_tensor,
)
from automodel_fn.bench._spec import FULL, QUICK, Case
from automodel_fn.ops._loss import lm_head_loss

_EXACT_ROWS = 1024


def _case(
    tokens: int,
    hidden: int = 4096,
    vocabulary: int = 128256,
    device: str = "cuda",
    *,
    group: str = FULL,
) -> Case:
    operands, logits = (tokens + vocabulary) * hidden * 2, tokens * vocabulary * 2
    return Case(
        f"{'quick-' * (group == QUICK)}loss-{tokens}",
        device=device,
        description=f"bf16 hidden states [{tokens:,}, {hidden:,}], weight [{vocabulary:,}, "
        f"{hidden:,}], mean of the losses; the ceiling is the products alone in bf16, one forward, "
        "two backward",
        parameters={
            "tokens": tokens,
            "hidden": hidden,
            "vocabulary": vocabulary,
            "is_bf16": 1,
            "forward_bytes": operands,
            "forward_backward_bytes": 2 * operands,
        },
        # Float32 logits, their softmax and the gradients of both; each subject's gradients.
        needed_bytes=2**30 + 10 * logits + 20 * operands,
        group=group,
        batch="loss",
    )


def _inputs(case: Case, generator: torch.Generator) -> Inputs:
    tokens, hidden, size = (case.parameter(name) for name in ("tokens", "hidden", "vocabulary"))
    states = random_tensor(case, generator, tokens, hidden).requires_grad_()
    weight = nn.Parameter(random_tensor(case, generator, size, hidden) / hidden**0.5)
    labels = torch.randint(size, (tokens,), generator=generator, device=case.device)
    return Inputs((states, weight, labels), grads=(torch.ones((), device=case.device),))


def _exact(inputs: Inputs) -> Exact:
    """In float64, some tokens at a time: all logits at once would not fit."""
    states, weight, labels = (tensor.detach() for tensor in inputs.tensors)
    wide = weight.double()
    loss, of_weight, of_states = 0.0, torch.zeros_like(wide), []
    for rows, targets in zip(states.split(_EXACT_ROWS), labels.split(_EXACT_ROWS), strict=True):
        rows = rows.double()
        logits = rows @ wide.T
        loss = loss + functional.cross_entropy(logits, targets, reduction="sum")
        of_logits = logits.softmax(-1)
        of_logits[torch.arange(len(targets)), targets] -= 1
        of_logits /= len(labels)
        of_states.append(of_logits @ wide)
        of_weight.addmm_(of_logits.T, rows)
    outputs = (torch.as_tensor(loss) / len(labels),)
    return Exact(outputs, gradients=(torch.cat(of_states), of_weight))


def _ours(states: Tensor, weight: Tensor, labels: Tensor) -> Call:
    return lambda: lm_head_loss(states, weight, labels).loss


def _unfused(states: Tensor, weight: Tensor, labels: Tensor) -> Call:
    return lambda: functional.cross_entropy(functional.linear(states, weight).float(), labels)


def torchs_chunked() -> Any:
    """The loss of a head in chunks that torch itself has, from 2.13 on.

    Raises:
        ImportError: This torch has none.
    """
    from torch.nn.functional import linear_cross_entropy

    return partial(linear_cross_entropy, options=nn.LinearCrossEntropyOptions())


def _chunked(states: Tensor, weight: Tensor, labels: Tensor) -> Call:
    return partial(torchs_chunked(), states, weight, labels)


def _liger(states: Tensor, weight: Tensor, labels: Tensor) -> Call:
    from liger_kernel.transformers import (  # pyright: ignore[reportMissingImports] - a peer
        LigerFusedLinearCrossEntropyLoss,
    )

    return partial(LigerFusedLinearCrossEntropyLoss(), weight, states, labels)


LOSS = Op(
    (_case(4096), _case(16384), _case(128, 128, 1024, group=QUICK)),
    inputs=_inputs,
    exact=_exact,
    ways={OURS: _ours, TORCH: _unfused, TORCH_CHUNKED: _chunked, LIGER: _liger},
    ceiling=head_products,
)
LOSS_ON_CPU = attrs.evolve(
    LOSS,
    cases=(_case(512, 1024, 16384, "cpu"), _case(64, 64, 512, "cpu", group=QUICK)),
    ways={OURS: _ours, TORCH: _unfused, TORCH_CHUNKED: _chunked},
)
