"""Look at this machine: versions, devices, packages. Imports none of the optional packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path

import torch

from automodel_fn.backend._availability import Availability, Device, Package
from automodel_fn.backend._needs import PACKAGES, TE

_MODULES = {
    "transformer-engine": "transformer_engine",
    "grouped_gemm": "grouped_gemm",
    "deep_ep": "deep_ep",
    "uccl": "uccl",
    "tilelang": "tilelang",
    "torchao": "torchao",
    "transformers": "transformers",
    "triton": "triton",
}


def probe() -> Availability:
    """What is installed and which accelerators there are. Changes nothing, imports nothing big.

    Returns:
        An Availability: a value to read, print and compare.

    Example:
        >>> probe().torch == torch.__version__
        True
    """
    return Availability(
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        devices=_devices(),
        packages=tuple(_package(name) for name in ("transformers", "triton", *PACKAGES)),
        num_threads=torch.get_num_threads(),
        world_size=_world_size(),
    )


def _devices() -> tuple[Device, ...]:
    if not torch.cuda.is_available():
        return ()
    return tuple(device(index) for index in range(torch.cuda.device_count()))


def device(index: int) -> Device:
    """The GPU of that index."""
    found = torch.cuda.get_device_properties(index)
    capability = (found.major, found.minor)
    return Device(found.name, capability=capability, memory_bytes=found.total_memory)


def _world_size() -> int:
    # Before the process group is there, its launcher has left the number of ranks here.
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size()
    announced = os.environ.get("WORLD_SIZE", "")
    return max(int(announced), 1) if announced.isdecimal() else 1


def _package(name: str) -> Package:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Package(name)
    module = _MODULES[name]
    problem = "" if importlib.util.find_spec(module) else f"its module {module} is not importable"
    if name == TE and not problem and not _has_extension():
        problem = "its PyTorch extension is not installed (transformer-engine[pytorch])"
    return Package(name, version=version, problem=problem)


def _has_extension() -> bool:
    # Built from source it is a module of its own; a wheel puts it where only Transformer Engine
    # looks for it.
    if importlib.util.find_spec("transformer_engine_torch"):
        return True
    package = importlib.util.find_spec("transformer_engine")
    folders = package.submodule_search_locations or () if package else ()
    return any(
        list(Path(folder).glob(pattern))
        for folder in folders
        for pattern in ("transformer_engine_torch*.so", "wheel_lib/transformer_engine_torch*.so")
    )
