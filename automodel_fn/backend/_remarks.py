"""What the packages of a machine do that their users may not expect."""

from __future__ import annotations

from automodel_fn.backend._availability import Availability

_TE_UNDER_FSDP2 = (
    "under FSDP2, Linear, LayerNormLinear and LayerNormMLP keep no quantized weights, whatever the "
    "step says; GroupedLinear keeps its own, unsharded on every rank: a byte a value for each of "
    "two layouts"
)


def remarks(found: Availability) -> tuple[tuple[str, str], ...]:
    """Package and remark, of those packages that can be used here.

    Example:
        >>> from automodel_fn.backend._availability import Package
        >>> te = Package("transformer-engine", version="2.20.2")
        >>> found = Availability(python="3.12.3", torch="2.11.0", packages=(te,))
        >>> [name for name, _ in remarks(found)], remarks(Availability(python="3", torch="2"))
        (['transformer-engine'], ())
    """
    te = found.package("transformer-engine")
    return ((te.name, _TE_UNDER_FSDP2),) if te.is_usable else ()
