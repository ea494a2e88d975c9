"""Look at this machine: versions, devices, packages. Imports none of the optional packages."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform

import torch

from automodel_fn.backend._availability import PACKAGES, Availability, Device, Package

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
    )


def _devices() -> tuple[Device, ...]:
    if not torch.cuda.is_available():
        return ()
    found = (torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count()))
    return tuple(
        Device(item.name, capability=(item.major, item.minor), memory_bytes=item.total_memory)
        for item in found
    )


def _package(name: str) -> Package:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return Package(name)
    module = _MODULES[name]
    problem = "" if importlib.util.find_spec(module) else f"its module {module} is not importable"
    if (
        name == "transformer-engine"
        and not problem
        and not importlib.util.find_spec("transformer_engine_torch")
    ):
        problem = "its PyTorch extension is not installed (transformer-engine[pytorch])"
    return Package(name, version=version, problem=problem)
