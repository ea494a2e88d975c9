"""Whether a model does nothing to its logits but scale them, found by trying its forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from automodel_fn.convert._losses import without_logits
from automodel_fn.convert._overlay import Overlay, names_in, probe_tensor


class _Found(Exception):
    """Carries what the forward gave to its loss."""

    def __init__(self, logits: Any) -> None:
        super().__init__()
        self.logits = logits


class _Output:
    """The output of a model's body: hidden states, and nothing else."""

    def __init__(self, hidden_states: Tensor) -> None:
        self.last_hidden_state = hidden_states

    def __getitem__(self, index: int) -> Tensor:
        return self.last_hidden_state

    def __getattr__(self, name: str) -> None:
        return None


class _Head(Overlay):
    def __call__(self, hidden_states: Tensor) -> Tensor:
        return hidden_states


def scales_logits_only(model: nn.Module, own: type[Any]) -> bool:
    """Whether the loss is of what the head gives, multiplied by a number at most.

    The forward of the class is run on the CPU with a body and a head that are not the model's.

    Args:
        model: The model; its weights are not read.
        own: Its class.
    """
    head: Any = model._modules["lm_head"]
    # As wide as logits are, so that it shows if some of them are left out, and large ones, cut off.
    hidden_states = probe_tensor(1, 3, head.weight.shape[0])
    hidden_states[:, 1] *= 1e6
    body = {name: _given(hidden_states) for name in model._modules if name in names_in(own)}
    body["lm_head"] = _Head(head, weight=probe_tensor(1))
    tokens = torch.zeros(1, 3, dtype=torch.int64, device="cpu")
    try:
        with torch.no_grad(), torch.device("cpu"):
            own.forward(without_logits(model, _raise, **body), input_ids=tokens, labels=tokens)
    except _Found as found:
        return _is_multiple(found.logits, hidden_states)
    # It wants more than a body that gives hidden states.
    except (AttributeError, TypeError, RuntimeError, ValueError, LookupError):
        return False
    return False


def _given(hidden_states: Tensor) -> Any:
    return lambda *args, **kwargs: _Output(hidden_states)


def _raise(logits: Any, *args: Any, **kwargs: Any) -> Any:
    raise _Found(logits)


def _is_multiple(found: Any, of: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != of.shape:
        return False
    found, of = found.double(), of.double()
    scale = (found * of).sum() / (of * of).sum()
    return torch.allclose(found, scale * of, rtol=1e-5, atol=1e-6)
