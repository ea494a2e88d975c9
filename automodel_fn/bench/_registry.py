"""Every benchmark, found by its file's name."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from automodel_fn.bench._spec import Benchmark

_PREFIX = "_bench_"


def _found() -> Iterator[Benchmark]:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name.startswith(_PREFIX):
            yield importlib.import_module(f"automodel_fn.bench.{module.name}").BENCHMARK


BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType({found.name: found for found in _found()})
"""The benchmarks by name: one file `_bench_<name>.py` each, which exports `BENCHMARK`."""
