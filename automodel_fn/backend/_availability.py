"""What can run here, as data."""

from __future__ import annotations

import re
from collections.abc import Iterator

import attrs

from automodel_fn.backend._needs import BACKENDS, NEEDS, Need
from automodel_fn.errors import ConfigError


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
        reason: Why, or why not: all that is missing.
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
        devices: The accelerators. What needs one can run if any of them suits.
        packages: The optional packages that this library knows.
        num_threads: How many threads PyTorch uses on the CPU.
        world_size: How many ranks train together; 1 for a process of its own.

    Example:
        >>> found = Availability(python="3.11.7", torch="2.13.0")
        >>> found.package("transformer-engine").is_usable
        False
        >>> found.verdict("attn=te").reason
        'transformer-engine is not installed; there is no CUDA GPU'
    """

    python: str = attrs.field(kw_only=True)
    torch: str = attrs.field(kw_only=True)
    cuda: str | None = attrs.field(default=None, kw_only=True)
    devices: tuple[Device, ...] = attrs.field(default=(), kw_only=True)
    packages: tuple[Package, ...] = attrs.field(default=(), kw_only=True)
    num_threads: int = attrs.field(default=1, kw_only=True)
    world_size: int = attrs.field(default=1, kw_only=True)

    def package(self, name: str) -> Package:
        """The package of that name; not installed if it is not among them."""
        return next((p for p in self.packages if p.name == name), Package(name))

    def verdicts(self) -> tuple[Verdict, ...]:
        """For each backend whether it can run here, and why not."""
        return tuple(self.verdict(backend) for backend in BACKENDS)

    def verdict(self, backend: str) -> Verdict:
        """Whether one backend can run here, and why not.

        Args:
            backend: Field and value, as "attn=te".

        Raises:
            ConfigError: There is no such backend.
        """
        tried = [(need, tuple(_missing(self, need))) for need in NEEDS if need.backend == backend]
        if not tried:
            raise ConfigError(
                f"backend={backend!r} is none that is known; expected field=value, as 'attn=te'."
            )
        # Of several ways the one for this GPU is spoken of, then the one of which least is missing.
        _, missing = min(tried, key=lambda pair: (bool(_lacks_device(self, pair[0])), len(pair[1])))
        return Verdict(backend, can_run=not missing, reason="; ".join(missing) or "can run")


def _missing(found: Availability, need: Need) -> Iterator[str]:
    if need.package:
        yield from _lacks_package(found.package(need.package), need.version)
    device = _lacks_device(found, need)
    if device:
        yield device
    elif need.cuda and _release(found.cuda or "") < need.cuda:
        has = f"for CUDA {found.cuda}" if found.cuda else "without CUDA"
        yield f"PyTorch was built {has}, at least CUDA {dotted(need.cuda)} is needed"
    if found.world_size < need.ranks:
        yield f"world_size={found.world_size}, at least {need.ranks} ranks are needed"


def _lacks_package(package: Package, least: tuple[int, ...]) -> Iterator[str]:
    if package.version is None:
        yield f"{package.name} is not installed"
        return
    if package.problem:
        yield f"{package.name} {package.version}: {package.problem}"
    if _release(package.version) < least:
        yield f"{package.name} is {package.version}, at least {dotted(least)} is needed"


def _lacks_device(found: Availability, need: Need) -> str:
    if need.capability is None:
        return ""
    have = [device.capability for device in found.devices]
    if not have:
        return "there is no CUDA GPU"
    if any(need.capability <= each and (need.below is None or each < need.below) for each in have):
        return ""
    wanted = f"at least {dotted(need.capability)}"
    if need.below is not None and max(have) >= need.below:
        wanted = f"less than {dotted(need.below)}"
    return f"the GPU has compute capability {dotted(max(have))}, {wanted} is needed"


def _release(version: str) -> tuple[int, ...]:
    """The numbers that a version begins with; () if it does not begin with one."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def dotted(version: tuple[int, ...]) -> str:
    """A version or a compute capability as it is written.

    Example:
        >>> dotted((8, 9))
        '8.9'
    """
    return ".".join(map(str, version))
