"""What becomes of one tensor."""

from __future__ import annotations

import math

import attrs
import torch

from automodel_fn.dtypes import CASTABLE, dtype_name
from automodel_fn.errors import ConfigError
from automodel_fn.plans import Row

CAST, KEEP, SKIP = "cast", "keep", "skip"
_ACTIONS = (CAST, KEEP, SKIP)
_KINDS = ("parameter", "buffer", "nonpersistent_buffer")
_INVERSE = "inverse of: "


@attrs.frozen
class TensorCast:
    """What becomes of one tensor, and why.

    Args:
        names: The canonical FQN, then its aliases; without wrappers such as `_orig_mod`.
        kind: "parameter", "buffer" or "nonpersistent_buffer".
        shape: Its shape.
        from_dtype: The dtype that it is stored in.
        to_dtype: The dtype that it will be stored in; the same unless it changes.
        action: "cast"; "keep" (an fp32 pin, also one that is cast up to float32); or "skip" (not a
            kind that is cast, already right, or in `skip=`).
        reason: The rule that decided.
        requires_grad: Whether it is trainable.
        inverse_of: The action that this entry takes back, in an inverse; None elsewhere.

    Example:
        >>> from automodel_fn import bf16, cast_plan
        >>> entry = cast_plan(torch.nn.Linear(2, 2), bf16).entries[0]
        >>> entry.names, entry.action, entry.from_dtype, entry.to_dtype
        (('weight',), 'cast', torch.float32, torch.bfloat16)
    """

    names: tuple[str, ...]
    kind: str = attrs.field(kw_only=True, validator=attrs.validators.in_(_KINDS))
    shape: tuple[int, ...] = attrs.field(kw_only=True)
    from_dtype: torch.dtype = attrs.field(kw_only=True)
    to_dtype: torch.dtype = attrs.field(kw_only=True)
    action: str = attrs.field(kw_only=True, validator=attrs.validators.in_(_ACTIONS))
    reason: str = attrs.field(kw_only=True)
    requires_grad: bool = attrs.field(kw_only=True)
    inverse_of: str | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.in_((None, CAST, KEEP))
    )

    def __attrs_post_init__(self) -> None:
        """Refuse an entry that could only lose data, as a hand-made plan may have."""
        if self.changes and (
            self.action == SKIP
            or (self.action == KEEP and self.to_dtype != torch.float32)
            or not {self.from_dtype, self.to_dtype} <= CASTABLE
        ):
            raise ConfigError(
                f"{self.names[0]}: {self.action} {dtype_name(self.from_dtype)} to "
                f"{dtype_name(self.to_dtype)} is no cast; only bf16, fp16 and fp32 are cast to one "
                "another, a pin to fp32 alone, and what is skipped keeps its dtype."
            )

    @property
    def name(self) -> str:
        """The canonical FQN."""
        return self.names[0]

    @property
    def changes(self) -> bool:
        """Whether the tensor's dtype changes."""
        return self.from_dtype != self.to_dtype

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def bytes_before(self) -> int:
        """The size that it is stored in."""
        return self.numel * self.from_dtype.itemsize

    @property
    def bytes_after(self) -> int:
        """The size that it will be stored in."""
        return self.numel * self.to_dtype.itemsize

    def row(self) -> Row:
        """The entry in words."""
        return Row(
            self.name,
            before=dtype_name(self.from_dtype),
            after=dtype_name(self.to_dtype),
            action=self.action,
            reason=self.reason,
            shape="x".join(map(str, self.shape)) or "scalar",
            num_aliases=len(self.names) - 1,
            bytes_before=self.bytes_before,
            bytes_after=self.bytes_after,
        )

    def inverse(self) -> TensorCast:
        """The entry that brings the stored dtype back; an unchanged one is its own inverse."""
        if not self.changes:
            return self
        is_inverse = self.inverse_of is not None
        return attrs.evolve(
            self,
            from_dtype=self.to_dtype,
            to_dtype=self.from_dtype,
            action=self.inverse_of or CAST,
            reason=self.reason.removeprefix(_INVERSE) if is_inverse else _INVERSE + self.reason,
            inverse_of=None if is_inverse else self.action,
        )
