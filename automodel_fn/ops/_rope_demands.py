"""What must hold of what `apply_rope` is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from automodel_fn.errors import ConfigError, itemized
from automodel_fn.ops._rope_rotation import DIMENSIONS, Rotation

_INTEGERS = (torch.int64, torch.int32)


def demand_fitting(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, rotation: Rotation
) -> None:
    """Refuse what `apply_rope` cannot be computed of, all reasons at once.

    Raises:
        ConfigError: Something does not fit.
    """
    lines = _complaints_about_heads(q, k, rotation)
    if not lines:
        lines = [
            *_complaints_about_tables(q, cos, sin, rotation),
            *_complaints_about_positions(q, cos, ids, rotation),
        ]
    if lines:
        raise ConfigError(itemized("apply_rope cannot be computed:", lines))


def _complaints_about_heads(q: Tensor, k: Tensor, rotation: Rotation) -> list[str]:
    layout, (of_q, of_k) = rotation.layout, (q.shape, k.shape)
    if layout not in DIMENSIONS:
        return [f"layout={layout!r} must be one of {', '.join(map(repr, DIMENSIONS))}"]
    lines: list[str] = []
    if len(of_q) != len(layout) or len(of_k) != len(layout):
        found = f"q has the shape {tuple(of_q)}, k has {tuple(of_k)}"
        return [f"{found}; layout={layout!r} asks for {len(layout)} dimensions"]
    head = DIMENSIONS[layout][2]
    if of_q[:head] != of_k[:head] or of_q[head + 1 :] != of_k[head + 1 :]:
        found = f"q has the shape {tuple(of_q)}, k has {tuple(of_k)}"
        lines.append(f"{found}; in layout={layout!r} only the heads (dimension {head}) may differ")
    if not q.is_floating_point() or q.dtype != k.dtype:
        lines.append(f"q is {q.dtype}, k is {k.dtype}; they must be of one floating point dtype")
    if q.device != k.device:
        lines.append(f"q is on {q.device}, k is on {k.device}; they must be on one device")
    if isinstance(q, DTensor) != isinstance(k, DTensor):
        lines.append("q and k must both be DTensors, or neither")
    return lines


def _complaints_about_tables(q: Tensor, cos: Tensor, sin: Tensor, rotation: Rotation) -> list[str]:
    lines: list[str] = []
    size, width = rotation.rotary_dim, cos.shape[-1] if cos.dim() else 0
    if size % 2 or not 0 < size <= q.shape[-1]:
        lines.append(f"rotary_dim={size} must be even, and from 2 to the {q.shape[-1]} of a head")
    if width not in (size, size // 2):
        lines.append(f"cos is {width} wide; rotary_dim={size} asks for {size // 2} or {size}")
    if cos.shape != sin.shape:
        lines.append(f"cos has the shape {tuple(cos.shape)}, sin has {tuple(sin.shape)}")
    if cos.dim() == 3:
        batch, token, _ = rotation.dimensions
        leading = (1 if batch is None else q.shape[batch], q.shape[token])
        if cos.shape[0] not in (1, leading[0]) or cos.shape[1] != leading[1]:
            found, asked = tuple(cos.shape), (*leading, width)
            lines.append(f"cos has the shape {found}; the tokens of q ask for {asked}")
    elif cos.dim() != 2:
        lines.append(f"cos has {cos.dim()} dimensions; it must be [P, R / 2] or [B, S, R]")
    for name, table in (("cos", cos), ("sin", sin)):
        if not table.is_floating_point() or table.device != q.device:
            found = f"{name} is {table.dtype} on {table.device}"
            lines.append(f"{found}; it must be floating point, on {q.device}")
        if table.requires_grad:
            lines.append(f"{name} requires a gradient, which is not computed; detach it")
    return lines


def _complaints_about_positions(
    q: Tensor, cos: Tensor, ids: Tensor | None, rotation: Rotation
) -> list[str]:
    batch, token, _ = rotation.dimensions
    length = q.shape[token]
    offset: Any = rotation.offset
    if ids is None:
        if isinstance(offset, bool) or not isinstance(offset, int | torch.SymInt):
            return [f"position_ids={offset!r} must be a tensor of integers, or an int"]
        if cos.dim() == 3:
            return ["cos has the rows of the tokens, so give no position_ids"] if offset else []
        if offset < 0 or offset + length > cos.shape[0]:
            found = f"the positions are {offset} to {offset + length - 1}"
            return [f"{found}; the tables have 0 to {cos.shape[0] - 1}"]
        return []
    if cos.dim() != 2:
        return ["position_ids ask for tables [P, R / 2]"]
    examples = (1 if batch is None else q.shape[batch], 1)
    fits = ids.dim() in (1, 2) and ids.shape[-1] == length
    if not fits or (ids.dim() == 2 and ids.shape[0] not in examples):
        asked = f"({length},)" if batch is None else f"({length},) or {(examples[0], length)}"
        return [f"position_ids have the shape {tuple(ids.shape)}; the tokens of q ask for {asked}"]
    if ids.dtype not in _INTEGERS or ids.device != q.device:
        found = f"position_ids are {ids.dtype} on {ids.device}"
        return [f"{found}; they must be int64 or int32, on {q.device}"]
    return _complaints_about_values(ids, cos.shape[0])


def _complaints_about_values(ids: Tensor, num_positions: Any) -> list[str]:
    has_values = type(ids) is Tensor and ids.device.type == "cpu" and ids.numel()
    if not has_values or torch.compiler.is_compiling():
        return []
    least, most = (int(value) for value in ids.aminmax())
    if least >= 0 and most < num_positions:
        return []
    return [f"the positions are {least} to {most}; the tables have 0 to {num_positions - 1}"]
