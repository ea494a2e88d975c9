"""The classes of Transformer Engine that are patched, as a record: a stand-in fits it too."""

from __future__ import annotations

import attrs
from torch import nn

FIRST_MICROBATCH = "is_first_microbatch"
"""Transformer Engine's name for what a StepContext calls `first_microbatch`."""


@attrs.frozen
class TEClasses:
    """Six classes whose `forward` takes `is_first_microbatch`, and the two norms, which do not.

    Args:
        linear: `transformer_engine.pytorch.Linear`, or a class that is called as it is.
        grouped_linear: `GroupedLinear`.
        layer_norm_linear: `LayerNormLinear`.
        layer_norm_mlp: `LayerNormMLP`.
        multihead_attention: `MultiheadAttention`.
        transformer_layer: `TransformerLayer`.
        rms_norm: `RMSNorm`.
        layer_norm: `LayerNorm`.

    Example:
        >>> from automodel_fn.testing import te_stand_ins
        >>> [cls.__name__ for cls in te_stand_ins().stepping()][:2]
        ['Linear', 'GroupedLinear']
    """

    linear: type[nn.Module] = attrs.field(kw_only=True)
    grouped_linear: type[nn.Module] = attrs.field(kw_only=True)
    layer_norm_linear: type[nn.Module] = attrs.field(kw_only=True)
    layer_norm_mlp: type[nn.Module] = attrs.field(kw_only=True)
    multihead_attention: type[nn.Module] = attrs.field(kw_only=True)
    transformer_layer: type[nn.Module] = attrs.field(kw_only=True)
    rms_norm: type[nn.Module] = attrs.field(kw_only=True)
    layer_norm: type[nn.Module] = attrs.field(kw_only=True)

    def stepping(self) -> tuple[type[nn.Module], ...]:
        """The classes whose `forward` takes `is_first_microbatch`."""
        return tuple(cls for field, cls in self.items() if takes_step(field))

    def items(self) -> tuple[tuple[str, type[nn.Module]], ...]:
        """The field and the class of each, in order."""
        return tuple((field.name, getattr(self, field.name)) for field in attrs.fields(TEClasses))


def takes_step(field: str) -> bool:
    """Whether the class of a field takes `is_first_microbatch`: all but the norms."""
    return field not in ("rms_norm", "layer_norm")
