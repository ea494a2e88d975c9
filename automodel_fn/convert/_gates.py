"""Routers: in which precision they project, and routers that send tokens to experts evenly."""

from __future__ import annotations

from functools import wraps
from typing import Any

import torch
from torch import Tensor

from automodel_fn.convert._overlay import Overlay
from automodel_fn.convert._settings import Behaviour, Namespace
from automodel_fn.dtypes import parse_dtype

# Odd numbers whose products spread consecutive ones over 32 bits (Knuth; Steele's SplitMix).
_SPREAD, _SPREAD_AGAIN = 2654435761, 2246822519
_WORD = 1 << 32


def _in_precision(below: type[Any], choice: str) -> Namespace:
    dtype = parse_dtype(choice)

    @wraps(below.forward)
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        named = {name: _to(parameter, dtype) for name, parameter in self._parameters.items()}
        return below.forward(Overlay(self, **named), hidden_states.to(dtype), *args, **kwargs)

    return {"forward": forward}


def _to(parameter: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if parameter is None else parameter.to(dtype)


def _balanced(below: type[Any], choice: str) -> Namespace:
    noise = noise_of(choice)

    @wraps(below.forward)
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden_states = hidden_states.flatten(0, -2)
        num_tokens, top_k = len(hidden_states), self.top_k
        logits = hidden_states.new_zeros(num_tokens, self.num_experts)
        scores = hidden_states.new_full((num_tokens, top_k), 1 / top_k)
        return logits, scores, even_experts(num_tokens, self, noise, hidden_states.device)

    return {"forward": forward}


def even_experts(num_tokens: int, router: Any, noise: float, device: torch.device) -> Tensor:
    """The experts of each token, `[T, K]`: all of them in turn, so that each gets as many tokens.

    The same in every call, so also in a recompute, and nothing waits for the device.

    Args:
        num_tokens: T.
        router: Has `top_k` and `num_experts`.
        noise: 0 to 1: the part of the tokens that go to experts that a hash of their number names,
            and the following ones.
        device: Where the tokens are.
    """
    top_k, num_experts = router.top_k, router.num_experts
    token = torch.arange(num_tokens, device=device)
    first = token * top_k
    if noise:
        hashed = (token + 1) * _SPREAD % _WORD
        other = hashed * _SPREAD_AGAIN % _WORD
        first = torch.where(hashed < int(noise * _WORD), other, first)
    return (first[:, None] + torch.arange(top_k, device=device)) % num_experts


def noise_of(choice: str) -> float:
    """The noise of a choice.

    Example:
        >>> noise_of("balanced"), noise_of("noise 0.5")
        (0.0, 0.5)
    """
    return float(choice.removeprefix("noise ")) if choice != "balanced" else 0.0


GATE_PRECISION = Behaviour(_in_precision)
FAKE_GATE = Behaviour(_balanced)
