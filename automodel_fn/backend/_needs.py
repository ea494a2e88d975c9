"""What each backend needs: the one table that says what can run where."""

from __future__ import annotations

import attrs

TE = "transformer-engine"


@attrs.frozen
class Need:
    """All that one backend needs; several of one backend are alternatives.

    Args:
        backend: Field and value, as "attn=te".
        package: The package it is in; "" for PyTorch itself.
        version: The least version of the package; () for any.
        capability: The least compute capability; None where it runs without a GPU.
        below: The compute capability from which on it runs no more; None for no end.
        cuda: The least version of CUDA that PyTorch was built for; None for any.
        ranks: How many ranks the process group has at least.
    """

    backend: str
    package: str = attrs.field(default="", kw_only=True)
    version: tuple[int, ...] = attrs.field(default=(), kw_only=True)
    capability: tuple[int, int] | None = attrs.field(default=None, kw_only=True)
    below: tuple[int, int] | None = attrs.field(default=None, kw_only=True)
    cuda: tuple[int, int] | None = attrs.field(default=None, kw_only=True)
    ranks: int = attrs.field(default=1, kw_only=True)


def _te(
    backend: str,
    version: tuple[int, ...] = (2, 0),
    capability: tuple[int, int] = (8, 0),
    below: tuple[int, int] | None = None,
    cuda: tuple[int, int] | None = None,
) -> Need:
    return Need(backend, package=TE, version=version, capability=capability, below=below, cuda=cuda)


def _dispatcher(name: str, package: str, capability: tuple[int, int]) -> Need:
    return Need(f"dispatcher={name}", package=package, capability=capability, ranks=2)


NEEDS = (
    Need("attn=eager"),
    Need("attn=sdpa"),
    Need("attn=flex"),
    _te("attn=te"),
    Need("attn=tilelang", package="tilelang", capability=(8, 0)),
    Need("linear=torch"),
    _te("linear=te"),
    Need("rms_norm=torch"),
    Need("rms_norm=torch_fp32"),
    _te("rms_norm=te"),
    Need("rope_fusion=False"),
    Need("rope_fusion=True"),
    Need("async_masks=False"),
    Need("async_masks=True"),
    Need("swiglu=torch"),
    Need("swiglu=fused"),
    Need("swiglu=recomputed"),
    Need("loss=torch"),
    Need("loss=fused"),
    Need("experts=torch"),
    Need("experts=torch_mm", capability=(8, 0)),
    _te("experts=te"),
    Need("experts=gmm", package="grouped_gemm", capability=(8, 0)),
    Need(
        "experts=torch_mm_mxfp8",
        package="torchao",
        version=(0, 13),
        capability=(10, 0),
        below=(12, 0),
    ),
    Need("dispatcher=torch"),
    _dispatcher("deepep", "deep_ep", (9, 0)),
    _dispatcher("hybridep", "deep_ep", (9, 0)),
    _dispatcher("uccl_ep", "uccl", (8, 0)),
    _te("te_fp8=current", (2, 2), (8, 9)),
    # Hopper has the products of blocks in hardware, from CUDA 12.9 on; later GPUs run them as
    # MXFP8, which Transformer Engine does since 2.9.
    _te("te_fp8=block", (2, 3), (9, 0), below=(10, 0), cuda=(12, 9)),
    _te("te_fp8=block", (2, 9), (10, 0), cuda=(12, 9)),
    # The class is in 2.0, but the experts' GroupedLinear takes it since 2.3. It is refused on 12.x,
    # which does not have all the matrix layouts that training needs.
    _te("te_fp8=mxfp8", (2, 3), (10, 0), below=(12, 0)),
    _te("te_fp8=delayed", (2, 0), (8, 9)),
    _te("te_fp8=nvfp4", (2, 8), (10, 0)),
    _te("te_fp8=custom", (2, 9)),
)
"""Every backend that there is, in the order in which they are shown."""

PACKAGES = tuple(dict.fromkeys(need.package for need in NEEDS if need.package))
BACKENDS = tuple(dict.fromkeys(need.backend for need in NEEDS))
