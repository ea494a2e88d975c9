"""What becomes of one module, in one respect."""

from __future__ import annotations

import attrs

from automodel_fn.errors import ConfigError
from automodel_fn.plans import Row

SWAP, KEEP, SKIP = "swap", "keep", "skip"
_ACTIONS = (SWAP, KEEP, SKIP)
_INVERSE = "inverse of: "


@attrs.frozen
class ModuleSwap:
    """What becomes of one module in the respect of one field of a backend, and why.

    Args:
        names: The FQN of the module, then the others under which it is registered; without wrappers
            such as `_orig_mod`, and "" for the model itself. Where one setting of a config is
            several modules', all of these.
        field: The field of BackendConfig; attention by Transformer Engine is a field of its own,
            "te_attn", and so are experts that are grouped here, "grouped_experts".
        module_class: The name of the module's own class.
        before: By which backend it runs now, in the words of the field.
        after: By which it will.
        action: "swap"; "keep" (it runs already as was asked, or asking has nothing to do there); or
            "skip" (it was asked for, and this module cannot, or is in `skip=`).
        reason: The rule that decided.

    Example:
        >>> swap = ModuleSwap(("norm",), field="rms_norm", module_class="LlamaRMSNorm",
        ...     before="torch", after="torch_fp32", action="swap", reason="as asked")
        >>> swap.name, swap.changes, swap.inverse().after
        ('norm', True, 'torch')
    """

    names: tuple[str, ...]
    field: str = attrs.field(kw_only=True)
    module_class: str = attrs.field(kw_only=True)
    before: str = attrs.field(kw_only=True)
    after: str = attrs.field(kw_only=True)
    action: str = attrs.field(kw_only=True, validator=attrs.validators.in_(_ACTIONS))
    reason: str = attrs.field(kw_only=True)

    def __attrs_post_init__(self) -> None:
        """Refuse an entry that says two things, as a hand-made plan may have."""
        if self.changes != (self.action == SWAP):
            raise ConfigError(
                f"{self.label}: {self.action} {self.field} from {self.before!r} to {self.after!r} "
                "is no entry; what is swapped changes, and what is kept or skipped does not."
            )

    @property
    def name(self) -> str:
        """The canonical FQN; "" for the model itself."""
        return self.names[0]

    @property
    def label(self) -> str:
        """The canonical FQN as it is shown."""
        return self.name or "(model)"

    @property
    def changes(self) -> bool:
        """Whether anything changes."""
        return self.before != self.after

    def row(self) -> Row:
        """The entry in words."""
        return Row(
            self.label,
            before=f"{self.field}={self.before}",
            after=f"{self.field}={self.after}",
            action=self.action,
            reason=self.reason,
            shape=self.module_class,
            num_aliases=len(self.names) - 1,
        )

    def inverse(self) -> ModuleSwap:
        """The entry that takes this one back; an unchanged one is its own inverse."""
        if not self.changes:
            return self
        is_inverse = self.reason.startswith(_INVERSE)
        return attrs.evolve(
            self,
            before=self.after,
            after=self.before,
            reason=self.reason.removeprefix(_INVERSE) if is_inverse else _INVERSE + self.reason,
        )
