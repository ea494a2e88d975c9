"""Where a run takes place: read in a fresh process, as the measurements are."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import warnings
from pathlib import Path
from typing import Any

import torch

from automodel_fn.bench._spec import Benchmark, Subject


def environment_report(benchmark: Benchmark, device: str) -> dict[str, Any]:
    """Versions, device and free memory, and for each subject that cannot be loaded why not.

    Args:
        benchmark: Its subjects are loaded one by one.
        device: "cpu" or "cuda".
    """
    problems = {subject.name: _load_problem(subject) for subject in benchmark.subjects}
    packages = dict.fromkeys(subject.package for subject in benchmark.subjects if subject.package)
    return {
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "platform": platform.platform(),
            "device": torch.cuda.get_device_name() if device == "cuda" else _processor(),
            "num_threads": torch.get_num_threads(),
            "num_cpus": len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1,
            "free_bytes": torch.cuda.mem_get_info()[0] if device == "cuda" else _free_memory(),
            "packages": {package: _version(package) for package in packages},
        },
        "absent": {name: problem for name, problem in problems.items() if problem},
    }


def _load_problem(subject: Subject) -> str:
    try:
        with warnings.catch_warnings():
            # What a peer's import warns of is no concern of who measures it.
            warnings.simplefilter("ignore")
            subject.load()
    except Exception as error:  # noqa: BLE001 - a package that is only half there raises anything
        # Results are shown to others: without the folder of this machine that an ImportError names.
        said = re.sub(r" \(\S+\.(py|so)\)$", "", str(error).partition("\n")[0])
        is_there = bool(subject.package) and _version(subject.package) is not None
        hint = f"install {'another version of ' if is_there else ''}{subject.package}"
        return f"it cannot be imported: {said}; {hint}."
    return ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    return _proc_field("/proc/cpuinfo", "model name") or platform.processor() or platform.machine()


def _free_memory() -> int | None:
    found = _proc_field("/proc/meminfo", "MemAvailable")
    return int(found.split()[0]) * 1024 if found else None


def _proc_field(path: str, field: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    pairs = (line.partition(":") for line in lines)
    return next((value.strip() for key, _, value in pairs if key.strip() == field), "")
