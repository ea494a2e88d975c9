"""Strategies for what is given to the loss of a head."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from automodel_fn.testing._strategies_tensors import CASTABLE, laid_out


@st.composite
def lm_head_loss_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `lm_head_loss`, by name: every option, chunks of any size, strides, no tokens.

    Args:
        draw: Given by hypothesis.

    Example:
        >>> from hypothesis import find
        >>> found = find(lm_head_loss_arguments(), lambda found: found["shift"])
        >>> found["shift"], found["hidden_states"].shape[-1] == found["weight"].shape[1]
        (True, True)
    """
    dtype = draw(st.sampled_from(CASTABLE))
    hidden, vocabulary = draw(st.integers(1, 6)), draw(st.integers(1, 9))
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=2)))
    ignore_index = draw(st.sampled_from((-100, 0, vocabulary)))
    reduction = draw(st.sampled_from(("mean", "sum", "none")))
    numel = torch.Size(shape).numel()
    classes = st.integers(0, vocabulary - 1) | st.just(ignore_index)
    labels = draw(st.lists(classes, min_size=numel, max_size=numel))
    return {
        "hidden_states": _tensor(draw, dtype, (*shape, hidden)),
        "weight": _tensor(draw, dtype, (vocabulary, hidden)),
        "labels": torch.tensor(labels, dtype=torch.int64).view(shape),
        "bias": _tensor(draw, dtype, (vocabulary,)) if draw(st.booleans()) else None,
        "shift": draw(st.booleans()),
        "ignore_index": ignore_index,
        "reduction": reduction,
        "num_items_in_batch": draw(st.none() | st.integers(1, 99)) if reduction == "mean" else None,
        "label_smoothing": draw(st.sampled_from((0.0, 0.1, 1.0))),
        "z_loss": draw(st.sampled_from((0.0, 1e-4, 0.5))),
        "softcap": draw(st.sampled_from((None, 0.5, 30.0))),
        "chunk_size": draw(st.none() | st.integers(1, 20)),
    }


def _tensor(draw: st.DrawFn, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    layout = draw(st.sampled_from(["contiguous", "sliced"]))
    wide = (*shape[:-1], shape[-1] * 2) if layout == "sliced" else shape
    numel = torch.Size(wide).numel()
    values = st.sampled_from((0.0, -0.0, 1.0, -1.0)) | st.floats(-4.0, 4.0, width=32)
    found = torch.tensor(draw(st.lists(values, min_size=numel, max_size=numel)))
    return laid_out(found.to(dtype).reshape(wide), layout)
