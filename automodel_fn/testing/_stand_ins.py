"""Stand-ins for the classes of Transformer Engine: same forwards, on any device.

Their `forward` has the signature of Transformer Engine 2.20, and they keep its rule of the
quantized weight: with `is_first_microbatch` None the weight is quantized at every call, with True
it is quantized and kept, with False the kept one is used. Quantizing is a rounding to float8 and
back, so a weight that is stale shows in the output. Each call makes new classes, to be patched.
"""

from __future__ import annotations

from automodel_fn.te._classes import TEClasses
from automodel_fn.testing._stand_ins_attention import attention_stand_ins
from automodel_fn.testing._stand_ins_linear import grouped_linear_stand_in, linear_stand_in
from automodel_fn.testing._stand_ins_norm import (
    layer_norm_linear_stand_in,
    layer_norm_mlp_stand_in,
    norm_stand_in,
)


def te_stand_ins() -> TEClasses:
    """New classes that behave as those of Transformer Engine, in what a patch of them can see.

    Each module counts in `num_quantizations` how often eager code quantized a weight of it.

    Source:
        Transformer Engine 2.20, `transformer_engine/pytorch/module` and `transformer.py`.

    Example:
        >>> import torch
        >>> Linear = te_stand_ins().linear
        >>> layer = Linear(2, 2)
        >>> for first in (True, False, False):
        ...     _ = layer(torch.ones(1, 2), is_first_microbatch=first)
        >>> layer.num_quantizations
        1
    """
    linear = linear_stand_in()
    layer_norm_linear, layer_norm_mlp = layer_norm_linear_stand_in(), layer_norm_mlp_stand_in()
    attention, layer = attention_stand_ins(linear, layer_norm_linear, layer_norm_mlp)
    return TEClasses(
        linear=linear,
        grouped_linear=grouped_linear_stand_in(),
        layer_norm_linear=layer_norm_linear,
        layer_norm_mlp=layer_norm_mlp,
        multihead_attention=attention,
        transformer_layer=layer,
        rms_norm=norm_stand_in("RMSNorm"),
        layer_norm=norm_stand_in("LayerNorm"),
    )
