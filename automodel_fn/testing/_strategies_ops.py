"""Strategies for what is given to the operations."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from automodel_fn.testing._strategies_tensors import CASTABLE, CORNERS, laid_out, tensor_of_bits

_SPECIAL = (0.0, -0.0, 1.0, -1.0, 1e-45, -1e-40, 1.00390625, 1.01171875, 1.0009765625)


def _values(dtype: torch.dtype, largest: float) -> st.SearchStrategy[float]:
    corners = tensor_of_bits(CORNERS[dtype], dtype).float()
    near = [value for value in corners.tolist() if abs(value) <= largest]
    special = st.sampled_from([*_SPECIAL, *near, largest, -largest])
    return special | st.floats(-4.0, 4.0, width=32) | st.floats(-largest, largest, width=32)


@st.composite
def _tensors(draw: st.DrawFn, dtype: torch.dtype, shape: tuple[int, ...], largest: float) -> Tensor:
    layout = draw(st.sampled_from(["contiguous", "sliced"]))
    wide = (*shape[:-1], shape[-1] * 2) if layout == "sliced" else shape
    numel = torch.Size(wide).numel()
    values = draw(st.lists(_values(dtype, largest), min_size=numel, max_size=numel))
    return laid_out(torch.tensor(values, dtype=torch.float32).to(dtype).reshape(wide), layout)


@st.composite
def norm_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `rms_norm_fp32`, by name: every pair of dtypes, empty and strided inputs.

    Among the values are -0.0, subnormals, ties of the rounding to 16 bits, and large ones.

    Args:
        draw: Given by hypothesis.

    Example:
        >>> from hypothesis import find
        >>> find(norm_arguments(), lambda found: found["weight"] is None)["weight_multiply"]
        'fp32'
    """
    hidden = draw(st.integers(1, 9))
    shape = (*draw(st.lists(st.integers(0, 3), max_size=2)), hidden)
    kinds = st.sampled_from((*CASTABLE, torch.float64))
    dtype, stored = draw(kinds), draw(kinds)
    largest = 60000.0 if dtype == torch.float16 else 2.0**62
    return {
        "x": draw(_tensors(dtype, shape, largest)),
        "weight": draw(st.none() | _tensors(stored, (hidden,), 1000.0)),
        "eps": draw(st.sampled_from((1e-5, 1e-6, 1e-12, 0.5))),
        "weight_multiply": draw(st.sampled_from(("fp32", "input"))),
    }


@st.composite
def residual_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `check_rms_norm_residual`, by name: those of a norm, and what is added.

    Args:
        draw: Given by hypothesis.

    Example:
        >>> from hypothesis import find
        >>> sorted(find(residual_arguments(), lambda found: True))
        ['eps', 'residual', 'weight', 'weight_multiply', 'x']
    """
    found = draw(norm_arguments())
    dtype = draw(st.sampled_from((*CASTABLE, torch.float64)))
    return {**found, "residual": draw(_tensors(dtype, tuple(found["x"].shape), 1000.0))}


@st.composite
def swiglu_arguments(draw: st.DrawFn) -> dict[str, Tensor]:
    """Arguments of `check_swiglu`, by name: every dtype, empty and strided inputs.

    Args:
        draw: Given by hypothesis.

    Example:
        >>> from hypothesis import find
        >>> sorted(find(swiglu_arguments(), lambda found: True))
        ['gate', 'up']
    """
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from((*CASTABLE, torch.float64)))
    largest = 200.0 if dtype == torch.float16 else 2.0**62
    return {name: draw(_tensors(dtype, shape, largest)) for name in ("gate", "up")}


@st.composite
def lm_head_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `check_lm_head_logits`, by name: heads, hidden states, what to keep of them.

    Args:
        draw: Given by hypothesis.

    Example:
        >>> from hypothesis import find
        >>> find(lm_head_arguments(), lambda found: found["precision"] == "fp32")["logits_to_keep"]
        0
    """
    hidden, vocabulary = draw(st.integers(1, 9)), draw(st.integers(1, 5))
    precision = draw(st.sampled_from((None, "fp32", "bf16x3", "bf16")))
    takes_any = precision in (None, "fp32")
    stored = draw(st.sampled_from(CASTABLE))
    dtype = draw(st.sampled_from(CASTABLE)) if takes_any else torch.bfloat16
    lm_head = nn.Linear(hidden, vocabulary, bias=draw(st.booleans()), dtype=stored)
    with torch.no_grad():
        for weight in lm_head.parameters():
            weight.copy_(draw(_tensors(stored, tuple(weight.shape), 16.0)))
    leading, length = draw(st.sampled_from(((), (1,), (2,)))), draw(st.integers(1, 5))
    positions = st.lists(st.integers(0, length - 1), max_size=4)
    indices = st.builds(torch.tensor, positions, dtype=st.sampled_from((torch.int64, torch.uint8)))
    return {
        "lm_head": lm_head,
        "hidden_states": draw(_tensors(dtype, (*leading, length, hidden), 16.0)),
        "logits_to_keep": draw(st.integers(0, length) | indices),
        "precision": precision,
    }


@st.composite
def rope_parameters(draw: st.DrawFn) -> dict[str, Any]:
    """Flat `rope_parameters`, as `check_rope_config` takes them.

    Args:
        draw: Given by hypothesis.

    Example:
        >>> from hypothesis import find
        >>> find(rope_parameters(), lambda found: "factor" in found)["rope_type"]
        'linear'
    """
    found: dict[str, Any] = {
        "rope_theta": draw(st.integers(1, 10**9) | st.floats(1.0, 1e9)),
        "rope_type": draw(st.sampled_from(("default", "linear", "llama3", "yarn", "longrope"))),
    }
    if draw(st.booleans()):
        found["partial_rotary_factor"] = draw(st.sampled_from((0.25, 0.5, 1.0, 4.0)))
    if found["rope_type"] != "default":
        found["factor"] = draw(st.floats(1.0, 64.0))
    if found["rope_type"] == "longrope":
        found["short_factor"] = draw(st.lists(st.floats(1.0, 4.0), max_size=3))
    return found
