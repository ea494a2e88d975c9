"""Rotary embeddings as an operator of torch's dispatcher: for compiled code and for DTensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.experimental import register_sharding

from automodel_fn.ops._rope_kernel import rotated_by_kernel
from automodel_fn.ops._rope_rotation import DIMENSIONS, Rotation


# The first number comes before the layout: what DTensors remember of a call begins there.
@torch.library.custom_op("automodel_fn::apply_rope", mutates_args=())
def rope_operator(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor | None,
    rotary_dim: int,
    layout: str,
    offset: int,
    interleaved: bool,
    inverse: bool,
) -> tuple[Tensor, Tensor]:
    """`apply_rope` of what fits; the last five are those of a `Rotation`."""
    rotation = Rotation(rotary_dim, layout, offset, interleaved, inverse)
    return rotated_by_kernel(q, k, cos, sin, position_ids, rotation)


@rope_operator.register_fake
def _(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k)


def _keep_tables(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, cos, sin, position_ids, *rest = inputs
    ctx.save_for_backward(cos, sin, position_ids)
    ctx.rotation = Rotation(*rest)


def _gradients(ctx: Any, of_q: Tensor, of_k: Tensor) -> tuple[Tensor | None, ...]:
    of_q, of_k = rope_operator(of_q, of_k, *ctx.saved_tensors, *ctx.rotation.inverted())
    return of_q, of_k, *[None] * 8


rope_operator.register_autograd(_gradients, setup_context=_keep_tables)


@register_sharding(torch.ops.automodel_fn.apply_rope.default)
def _(
    q: Any, k: Any, cos: Any, sin: Any, position_ids: Any, rotary_dim: int, layout: str, *rest: Any
) -> list[Any]:
    batch, token, head = DIMENSIONS[layout]
    numbers = [None] * (2 + len(rest))

    def shared(place_of_q: Any, place_of_k: Any, table: Any, ids: Any) -> Any:
        both = [place_of_q, place_of_k]
        return both, [*both, table, table, ids, *numbers]

    whole = Replicate()
    no_ids = position_ids is None
    is_by_token = len(cos.shape) == 3
    found = [shared(whole, whole, whole, None if no_ids else whole)]
    heads = [(Shard(head), whole), (whole, Shard(head)), (Shard(head), Shard(head))]
    found += [shared(*pair, whole, None if no_ids else whole) for pair in heads]
    if batch is not None:
        table = _of_examples(cos, q.shape[batch], is_by_token)
        ids = (
            None
            if no_ids
            else _of_examples(position_ids, q.shape[batch], len(position_ids.shape) == 2)
        )
        found.append(shared(Shard(batch), Shard(batch), table, ids))
    if is_by_token or not no_ids:
        table = Shard(1) if is_by_token else whole
        ids = None if no_ids else Shard(len(position_ids.shape) - 1)
        found.append(shared(Shard(token), Shard(token), table, ids))
    return found


def _of_examples(x: Any, num_examples: int, has_examples: bool) -> Any:
    return Shard(0) if has_examples and x.shape[0] == num_examples else Replicate()
