"""Benchmarks: ours beside its peers, in one run, each measurement in a fresh process."""

from automodel_fn.bench._promises import Outcome
from automodel_fn.bench._registry import BENCHMARKS
from automodel_fn.bench._result import (
    Absence,
    BenchmarkResult,
    Description,
    Environment,
    Measurement,
)
from automodel_fn.bench._rows import BenchmarkRow
from automodel_fn.bench._runner import Progress, run_benchmark
from automodel_fn.bench._spec import Benchmark, Case, Measure, Measured, Promise, Subject
from automodel_fn.bench._statistics import Summary

__all__ = [
    "BENCHMARKS",
    "Absence",
    "Benchmark",
    "BenchmarkResult",
    "BenchmarkRow",
    "Case",
    "Description",
    "Environment",
    "Measure",
    "Measured",
    "Measurement",
    "Outcome",
    "Progress",
    "Promise",
    "Subject",
    "Summary",
    "run_benchmark",
]
