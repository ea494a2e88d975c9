"""Attention by Transformer Engine, as a module without parameters."""

from __future__ import annotations

from torch import Tensor, nn

from automodel_fn.te._attention import Cores, te_core
from automodel_fn.te._load import load_te_module
from automodel_fn.te._unallocated import is_tensor_unallocated


class TEAttention(nn.Module):
    """`softmax(q k^T * scale) v` by `DotProductAttention`, which is made for the sizes that come.

    It is no submodule, so that nothing of it is in a state dict, and copies make their own.

    Args:
        is_causal: Whether later tokens are hidden.
        scale: Of the products; None is `D ** -0.5`.

    Raises:
        BackendUnavailableError: Transformer Engine cannot be imported here.
    """

    def __init__(self, *, is_causal: bool, scale: float | None) -> None:
        super().__init__()
        load_te_module()
        self.is_causal, self.scale = is_causal, scale
        self._cores = Cores()

    def reset_parameters(self) -> None:
        """Nothing is to be filled."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Of `q` `[B, S, N, D]`, `k` `[B, S, K, D]` and `v` `[B, S, K, V]`: `[B, S, N, V]`."""
        shape = (*q.shape[:3], v.shape[-1])
        if is_tensor_unallocated(q):
            return q.new_empty(shape)
        core = te_core(
            self._cores, q, k, v, dropout=0.0, scale=self.scale, is_training=self.training
        )
        kind = "causal" if self.is_causal else "no_mask"
        q, k, v = (each.contiguous() for each in (q, k, v))
        return core(q, k, v, attn_mask_type=kind, qkv_format="bshd").view(shape)

    def extra_repr(self) -> str:
        """Its options, for `repr`."""
        return f"te, is_causal={self.is_causal}, scale={self.scale}"
