"""Rotary embeddings of queries and keys, in one pass forward and one backward.

Shapes: B examples, S tokens of an example, T tokens in all, N heads, D values of a head, of which
the first R are turned; P positions that tables have.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate

from automodel_fn.ops._choice import is_exporting
from automodel_fn.ops._rope_demands import demand_fitting
from automodel_fn.ops._rope_eager import rotated
from automodel_fn.ops._rope_operator import rope_operator
from automodel_fn.ops._rope_rotation import DIMENSIONS, Layout, Rotation, rotated_by_torch


def apply_rope(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | int = 0,
    layout: Layout | None = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queries and keys, each pair of values turned by the angle of its position. Changes neither.

    Computed in float32 and rounded once, to the dtype of `q`; float64 in float64. Every product is
    rounded before it is added, so a float32 result has the bits of Hugging Face's
    `apply_rotary_pos_emb`, on a CPU as on a GPU, compiled or not. The gradient is the rotation
    back, of any order; nothing is kept for it but tables and positions. DTensors may be sharded by
    example, token or head; plain tensors beside them are taken as replicated: position ids and
    tables are those of the whole.

    Args:
        q: `[B, S, N, D]`, `[B, N, S, D]` or `[T, N, D]`; the order of its memory does not matter
            (what Hugging Face's attention transposes is read where it lies), and is kept.
        k: The same with as many heads as it has.
        cos: Cosines, constants: `[P, R / 2]`, as `rope_tables` makes them, or the rows of the
            tokens themselves, `[B, S, R]` or `[1, S, R]`, as Hugging Face's rotary modules give
            them: each angle twice, in two halves, of which the first is read. Float32 keeps their
            precision; narrower ones are taken as they are.
        sin: Sines, the same.
        position_ids: The position of the first token, or those of all: `[S]`, `[B, S]`, `[T]`. Of
            tables `[P, ...]` only. A position that the tables do not have is an error on a CPU and
            NaN on a GPU, where looking would make the host wait.
        layout: "bshd", "bhsd" or "thd" (packed), the dimensions of `q`; None means "thd" for three
            dimensions and "bshd" for four.
        rotary_dim: R, even. None is 2 x the width of tables `[P, ...]` and the width of those
            `[B, S, ...]`; say it where yours are the other way round.
        interleaved: Whether a pair is two neighbours (GPT-J, Cohere), else a value and the one
            R / 2 later (GPT-NeoX, Llama). Of tables that repeat each angle at once, as Cohere's
            do, give `cos[..., ::2]` and `rotary_dim`.

    Returns:
        Turned `q` and `k`, in their dtype.

    Raises:
        ConfigError: An argument is not as described, or a table wants a gradient.

    Source:
        Su et al., RoFormer (arXiv 2104.09864); `apply_rotary_pos_emb` (Hugging Face Llama).

    Example:
        >>> q, k = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]]), torch.zeros(2, 1, 2)
        >>> cos, sin = torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [1.0]])
        >>> apply_rope(q, k, cos, sin)[0].flatten().tolist()
        [1.0, 0.0, 0.0, 1.0]
        >>> apply_rope(q, k, cos, sin, position_ids=torch.tensor([1, 0]))[0].flatten().tolist()
        [0.0, 1.0, 1.0, 0.0]
    """
    if layout is None:
        layout = "thd" if q.dim() == 3 else "bshd"
    if rotary_dim is None:
        rotary_dim = cos.shape[-1] * (2 if cos.dim() == 2 else 1)
    ids, offset = (position_ids, 0) if isinstance(position_ids, Tensor) else (None, position_ids)
    rotation = Rotation(rotary_dim, layout, offset, interleaved)
    demand_fitting(q, k, cos, sin, ids, rotation)
    if isinstance(q, DTensor):
        return _rotated_dtensors(q, k, cos, sin, ids, rotation)
    if torch.compiler.is_compiling() and not is_exporting():
        return rope_operator(q, k, cos, sin, ids, *rotation)
    if is_exporting() or torch._C._are_functorch_transforms_active():
        return rotated_by_torch(q, k, cos, sin, ids, rotation)
    return rotated(q, k, cos, sin, ids, rotation)


def apply_rope_reference(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    position_ids: Tensor | int = 0,
    layout: Layout | None = None,
    rotary_dim: int | None = None,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """What `apply_rope` approximates: complex products of pairs, in float64 and rounded nowhere.

    Takes what `apply_rope` takes.

    Example:
        >>> q, cos, sin = torch.tensor([[[3.0, 4.0]]]), torch.zeros(1, 1), torch.ones(1, 1)
        >>> apply_rope_reference(q, q, cos, sin)[0]
        tensor([[[-4.,  3.]]], dtype=torch.float64)
    """
    size = rotary_dim or cos.shape[-1] * (2 if cos.dim() == 2 else 1)
    layout = layout or ("thd" if q.dim() == 3 else "bshd")
    factor = torch.complex(cos.double(), sin.double())[..., : size // 2]
    if cos.dim() == 2:
        num_tokens = q.shape[DIMENSIONS[layout][1]]
        is_first = isinstance(position_ids, int)
        factor = factor[position_ids + torch.arange(num_tokens) if is_first else position_ids]
    factor = factor.unsqueeze(-3 if layout == "bhsd" else -2)

    def turned(x: Tensor) -> Tensor:
        pairs, rest = x.double().split([size, x.shape[-1] - size], -1)
        pairs = pairs.unflatten(-1, (-1, 2) if interleaved else (2, -1))
        product = torch.complex(*pairs.unbind(-1 if interleaved else -2)) * factor
        parts = torch.view_as_real(product.reshape((*x.shape[:-1], size // 2)))
        parts = parts if interleaved else parts.transpose(-1, -2)
        return torch.cat([parts.flatten(-2), rest], -1)

    return turned(q), turned(k)


def _rotated_dtensors(
    q: DTensor, k: Tensor, cos: Tensor, sin: Tensor, ids: Tensor | None, rotation: Rotation
) -> tuple[Tensor, Tensor]:
    if ids is None and cos.dim() == 2:
        # A shard of the tokens must know which they are.
        first, length = rotation.offset, q.shape[rotation.dimensions[1]]
        ids = torch.arange(first, first + length, device=q.device)
        rotation = rotation._replace(offset=0)
    cos, sin = _replicated(cos, q), _replicated(sin, q)
    ids = None if ids is None else _replicated(ids, q)
    return rope_operator(q, k, cos, sin, ids, *rotation)


def _replicated(x: Tensor, beside: DTensor) -> Tensor:
    if isinstance(x, DTensor):
        return x
    mesh = beside.device_mesh
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
