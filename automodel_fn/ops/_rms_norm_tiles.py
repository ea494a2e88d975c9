"""How many rows of an RMSNorm a program holds in registers, and with how many warps."""

from __future__ import annotations

from functools import cache

import attrs


@attrs.frozen
class Tile:
    """What one program holds in registers at once: whole rows.

    Args:
        rows: Their number, a power of 2.
        block: The hidden size, rounded up to a power of 2.
        forward_warps: Warps that share it in the forward pass.
        num_warps: Warps that share it in the backward pass.
        programs: How many programs of the backward pass a multiprocessor has room for.
    """

    rows: int
    block: int = attrs.field(kw_only=True)
    forward_warps: int = attrs.field(kw_only=True)
    num_warps: int = attrs.field(kw_only=True)
    programs: int = attrs.field(kw_only=True)


# The largest hidden size whose rows are held in registers; wider ones are read twice.
LARGEST = 16384


@cache
def tile_for(hidden: int) -> Tile:
    """The tile of a hidden size: about 4096 elements, of one row at least."""
    block = 1 << (hidden - 1).bit_length()
    num_warps = min(32, max(8, block // 512))
    return Tile(
        max(1, 4096 // block),
        block=block,
        forward_warps=max(8, block // 1024),
        num_warps=num_warps,
        programs=max(1, 16 // num_warps),
    )
