"""What is measured in one fresh process: a JSON request as the argument, a JSON line as output.

Run as `python -m automodel_fn.bench._worker REQUEST`; `_launch` does so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from typing import Any

from automodel_fn.bench._environment import environment_report
from automodel_fn.bench._registry import BENCHMARKS
from automodel_fn.bench._selection import chosen_benchmark, chosen_cases
from automodel_fn.bench._spec import Benchmark, Case, Measured, Subject, matches_any
from automodel_fn.errors import ConfigError


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What a request asks for.

    Args:
        request: "benchmark" and "device"; with lists "cases" and "subjects" each of the subjects is
            measured on each of the cases that it is for, without them the environment is described.

    Raises:
        ConfigError: It names something that there is not.

    Example:
        >>> found = answer({"benchmark": "cast", "device": "cpu"})
        >>> sorted(found)
        ['absent', 'environment']
    """
    benchmark = chosen_benchmark(request["benchmark"], BENCHMARKS)
    device = request["device"]
    if "subjects" not in request:
        return environment_report(benchmark, device)
    subjects = {subject.name: subject for subject in benchmark.subjects}
    for name in request["subjects"]:
        if name not in subjects:
            raise ConfigError(f"subject={name!r} is unknown; there are: {', '.join(subjects)}.")
    asked = [subjects[name] for name in request["subjects"]]
    return {
        "measured": [
            {
                "case": case.name,
                "subject": name,
                "values": dict(found.values),
                "facts": dict(found.facts),
                "problem": found.problem,
            }
            for case in chosen_cases(benchmark, device, request["cases"])
            for name, found in _measured(benchmark, case, asked).items()
        ]
    }


def _measured(benchmark: Benchmark, case: Case, asked: Sequence[Subject]) -> Mapping[str, Measured]:
    subjects = [subject for subject in asked if matches_any(case.name, subject.cases)]
    if benchmark.together is not None:
        return benchmark.together(case, [subject.name for subject in subjects])
    return {s.name: s.measure(case) for s in subjects if s.measure is not None}


def main(arguments: Sequence[str]) -> None:
    """Answer the request; what a subject prints goes to the standard error."""
    with redirect_stdout(sys.stderr):
        found = answer(json.loads(arguments[0]))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
