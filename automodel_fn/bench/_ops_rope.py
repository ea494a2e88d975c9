"""Rotary embeddings in the benchmark "ops": queries and keys turned by their positions.

Shapes: B examples, S tokens of each, N heads of queries and fewer of keys, D values of a head.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from automodel_fn.bench._device_time import Call
from automodel_fn.bench._ops_spec import (
    LIGER,
    OURS,
    TE,
    TORCH,
    Inputs,
    Op,
    by_autograd,
    copies,
    random_tensor,
)
from automodel_fn.bench._spec import FULL, QUICK, Case
from automodel_fn.ops._apply_rope import apply_rope, apply_rope_reference

_THETA = 500_000.0


def _case(
    batch: int, seq: int, heads: int = 32, kv_heads: int = 8, head: int = 128, group: str = FULL
) -> Case:
    size = batch * seq * (heads + kv_heads) * head * 2
    return Case(
        f"{'quick-' * (group == QUICK)}rope-{batch}x{seq}",
        device="cuda",
        description=f"bf16 [B {batch}, N {heads} and {kv_heads}, S {seq:,}, D {head}], as an "
        f"attention transposes them: q and k are read and written, in the backward dq and dk, "
        f"{2 * size / 1e6:,.1f} MB each time; tables made before",
        parameters={
            "batch": batch,
            "seq": seq,
            "heads": heads,
            "kv_heads": kv_heads,
            "head": head,
            "is_bf16": 1,
            "forward_bytes": 2 * size,
            "forward_backward_bytes": 4 * size,
        },
        needed_bytes=2**30 + 100 * size,
        group=group,
        batch="rope",
    )


def _inputs(case: Case, generator: torch.Generator) -> Inputs:
    batch, seq, head = (case.parameter(name) for name in ("batch", "seq", "head"))

    def made(heads: str) -> Tensor:
        shape = batch, seq, case.parameter(heads), head
        return random_tensor(case, generator, *shape).transpose(1, 2)

    q, k = made("heads").requires_grad_(), made("kv_heads").requires_grad_()
    exponents = torch.arange(0, head, 2, device=case.device) / head
    positions = torch.arange(seq, device=case.device)
    angles = torch.outer(positions, _THETA**-exponents)
    return Inputs((q, k, angles), grads=(made("heads"), made("kv_heads")))


def _exact(q: Tensor, k: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    return apply_rope_reference(q, k, angles.cos(), angles.sin(), layout="bhsd")


def _ours(q: Tensor, k: Tensor, angles: Tensor) -> Call:
    return partial(apply_rope, q, k, angles.cos(), angles.sin(), layout="bhsd")


def _hf_tables(q: Tensor, angles: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines as transformers' rotary modules give them: `[1, S, D]`, of q's dtype."""
    twice = torch.cat((angles, angles), dim=-1)[None]
    return twice.cos().to(q.dtype), twice.sin().to(q.dtype)


def _hf(q: Tensor, k: Tensor, angles: Tensor) -> Call:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return partial(apply_rotary_pos_emb, q, k, *_hf_tables(q, angles))


def _liger(q: Tensor, k: Tensor, angles: Tensor) -> Call:
    from liger_kernel.transformers.rope import (  # pyright: ignore[reportMissingImports] - a peer
        liger_rotary_pos_emb,
    )

    return partial(liger_rotary_pos_emb, q, k, *_hf_tables(q, angles))


def _te(q: Tensor, k: Tensor, angles: Tensor) -> Call:
    from transformer_engine.pytorch.attention.rope import (  # pyright: ignore[reportMissingImports] - a peer
        apply_rotary_pos_emb,
    )

    freqs = torch.cat((angles, angles), dim=-1)[:, None, None]

    def turned(x: Tensor) -> Tensor:
        lying = x.transpose(1, 2)
        return apply_rotary_pos_emb(lying, freqs, tensor_format="bshd", fused=True).transpose(1, 2)

    return lambda: (turned(q), turned(k))


ROPE = Op(
    (_case(4, 4096), _case(1, 4096), _case(1, 256, 4, 2, 64, QUICK)),
    inputs=_inputs,
    exact=by_autograd(_exact),
    ways={OURS: _ours, TORCH: _hf, TE: _te, LIGER: _liger},
    ceiling=copies,
)
