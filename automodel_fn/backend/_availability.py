"""What can run here, as data."""

from __future__ import annotations

import attrs


@attrs.frozen
class Package:
    """An optional package.

    Args:
        name: Its name on the package index.
        version: The installed version; None if it is not installed.
        problem: Why it cannot be used although it is installed, or "".
    """

    name: str
    version: str | None = attrs.field(default=None, kw_only=True)
    problem: str = attrs.field(default="", kw_only=True)

    @property
    def is_usable(self) -> bool:
        """Whether it is installed and nothing is known against it."""
        return self.version is not None and not self.problem


@attrs.frozen
class Device:
    """An accelerator.

    Args:
        name: Its name, as the driver gives it.
        capability: Compute capability, (major, minor).
        memory_bytes: Its memory.
    """

    name: str
    capability: tuple[int, int] = attrs.field(kw_only=True)
    memory_bytes: int = attrs.field(kw_only=True)


@attrs.frozen
class Verdict:
    """Whether one backend can run here, and why not.

    Args:
        backend: Field and value, as "attn=te".
        can_run: Whether it can.
        reason: Why, or why not and what to do.
    """

    backend: str
    can_run: bool = attrs.field(kw_only=True)
    reason: str = attrs.field(kw_only=True)


@attrs.frozen
class Availability:
    """Versions, devices and packages of a machine; a value, so that it can be made up for tests.

    Args:
        python: Version of Python.
        torch: Version of PyTorch.
        cuda: Version of CUDA that PyTorch was built for; None for a CPU build.
        devices: The accelerators.
        packages: The optional packages that this library knows.
        num_threads: How many threads PyTorch uses on the CPU.

    Example:
        >>> Availability(python="3.11.7", torch="2.13.0").package("transformer-engine").is_usable
        False
    """

    python: str = attrs.field(kw_only=True)
    torch: str = attrs.field(kw_only=True)
    cuda: str | None = attrs.field(default=None, kw_only=True)
    devices: tuple[Device, ...] = attrs.field(default=(), kw_only=True)
    packages: tuple[Package, ...] = attrs.field(default=(), kw_only=True)
    num_threads: int = attrs.field(default=1, kw_only=True)

    def package(self, name: str) -> Package:
        """The package of that name; not installed if it is not among them."""
        return next((p for p in self.packages if p.name == name), Package(name))

    def verdicts(self) -> tuple[Verdict, ...]:
        """For each backend whether it can run here, and why not."""
        return tuple(_verdict(self, *row) for row in _NEEDS)


_NEEDS: tuple[tuple[str, str, tuple[int, int] | None], ...] = (
    ("attn=eager", "", None),
    ("attn=sdpa", "", None),
    ("attn=flex", "", None),
    ("attn=te", "transformer-engine", (8, 0)),
    ("attn=tilelang", "tilelang", (8, 0)),
    ("linear=torch", "", None),
    ("linear=te", "transformer-engine", (8, 0)),
    ("rms_norm=torch", "", None),
    ("rms_norm=torch_fp32", "", None),
    ("rms_norm=te", "transformer-engine", (8, 0)),
    ("experts=torch", "", None),
    ("experts=torch_mm", "", (8, 0)),
    ("experts=te", "transformer-engine", (8, 0)),
    ("experts=gmm", "grouped_gemm", (8, 0)),
    ("experts=torch_mm_mxfp8", "torchao", (10, 0)),
    ("dispatcher=torch", "", None),
    ("dispatcher=deepep", "deep_ep", (9, 0)),
    ("dispatcher=hybridep", "deep_ep", (9, 0)),
    ("dispatcher=uccl_ep", "uccl", (8, 0)),
    ("te_fp8=current", "transformer-engine", (8, 9)),
    ("te_fp8=block", "transformer-engine", (9, 0)),
    ("te_fp8=mxfp8", "transformer-engine", (10, 0)),
)
"""Backend, the package it needs ("" for none), the least compute capability (None for any)."""

PACKAGES = tuple(dict.fromkeys(package for _, package, _ in _NEEDS if package))


def _verdict(
    found: Availability, backend: str, package: str, capability: tuple[int, int] | None
) -> Verdict:
    missing: list[str] = []
    if package:
        known = found.package(package)
        if known.version is None:
            missing.append(f"{package} is not installed")
        elif known.problem:
            missing.append(f"{package} {known.version}: {known.problem}")
    if capability is not None:
        best = max((device.capability for device in found.devices), default=None)
        least = ".".join(map(str, capability))
        if best is None:
            missing.append("there is no CUDA GPU")
        elif best < capability:
            has = ".".join(map(str, best))
            missing.append(f"the GPU has compute capability {has}, at least {least} is needed")
    return Verdict(backend, can_run=not missing, reason="; ".join(missing) or "can run")
