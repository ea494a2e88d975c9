"""Strategies for what is given to rotary embeddings."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from automodel_fn.ops._rope import RopeConfig
from automodel_fn.ops._rope_tables import rope_tables
from automodel_fn.testing._strategies_ops import _tensors
from automodel_fn.testing._strategies_tensors import CASTABLE

_MOST_POSITIONS = 9
_POSITIONS = st.integers(0, _MOST_POSITIONS - 1)


@st.composite
def rope_arguments(draw: st.DrawFn) -> dict[str, Any]:
    """Arguments of `check_rope`, by name: layouts, parts of a head, positions of every kind.

    Args:
        draw: Given by hypothesis.

    Example:
        >>> from hypothesis import find
        >>> find(rope_arguments(), lambda found: found["interleaved"])["layout"]
        'bshd'
    """
    layout = draw(st.sampled_from(("bshd", "bhsd", "thd")))
    batch, length = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    head_dim, half = draw(st.sampled_from(((2, 1), (4, 1), (4, 2), (7, 3))))
    dtype = draw(st.sampled_from((*CASTABLE, torch.float64)))
    largest = 60000.0 / 2 if dtype == torch.float16 else 2.0**62
    places = {"b": batch, "s": length, "t": length, "d": head_dim}
    q, k = (
        draw(_tensors(dtype, tuple({**places, "h": heads}[of] for of in layout), largest))
        for heads in (draw(st.integers(0, 3)), draw(st.integers(0, 2)))
    )
    config = RopeConfig(draw(st.sampled_from((1.0, 100.0, 10000.0))))
    tables = rope_tables(config, 2 * half, _MOST_POSITIONS)
    cos, sin = tables.cos, tables.sin
    given: dict[str, Any] = {"q": q, "k": k, "layout": layout}
    given["interleaved"] = draw(st.booleans())
    examples = 1 if layout == "thd" else batch
    kind = draw(st.sampled_from(("offset", "tokens", "examples", "rows")))
    if kind == "offset":
        given["position_ids"] = draw(st.integers(0, _MOST_POSITIONS - length))
    else:
        shape = (length,) if kind == "tokens" else (examples, length)
        numel = torch.Size(shape).numel()
        drawn = draw(st.lists(_POSITIONS, min_size=numel, max_size=numel))
        ids = torch.tensor(drawn, dtype=torch.int64).reshape(shape)
        if kind == "rows":
            cos, sin = (torch.cat([table[ids]] * 2, -1) for table in (cos, sin))
        else:
            given["position_ids"] = ids
    return given | {"cos": cos, "sin": sin}
