"""What a head and its loss could at best reach in bf16: the matrix products alone."""

from __future__ import annotations

from functools import partial

import torch

from automodel_fn.bench._device_time import Call
from automodel_fn.bench._ops_spec import Prepared
from automodel_fn.bench._spec import Case


def head_products(case: Case, num_sets: int) -> Prepared:
    """One product forward, two more backward, of bf16 operands that are not zeros.

    Args:
        case: Has "tokens", "hidden" and "vocabulary".
        num_sets: How many sets of operands.
    """
    sets = [_products(case) for _ in range(num_sets)]
    return Prepared(
        tuple(forward for forward, _, _ in sets),
        both=tuple(partial(_run, products) for products in sets),
    )


def _products(case: Case) -> tuple[Call, Call, Call]:
    tokens, hidden, size = (case.parameter(name) for name in ("tokens", "hidden", "vocabulary"))
    made = partial(torch.randn, device=case.device, dtype=torch.bfloat16)
    states, weight, logits = made(tokens, hidden), made(size, hidden), made(tokens, size)
    of_states, of_weight = torch.empty_like(states), torch.empty_like(weight)
    return (
        partial(torch.mm, states, weight.T, out=logits),
        partial(torch.mm, logits, weight, out=of_states),
        partial(torch.mm, logits.T, states, out=of_weight),
    )


def _run(calls: tuple[Call, ...]) -> None:
    for call in calls:
        call()
