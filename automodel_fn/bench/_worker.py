"""One measurement in one fresh process: a JSON request as the argument, one JSON line as output.

Run as `python -m automodel_fn.bench._worker REQUEST`; `_launch` does so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from typing import Any

from automodel_fn.bench._environment import environment_report
from automodel_fn.bench._registry import BENCHMARKS
from automodel_fn.bench._selection import chosen_benchmark, chosen_cases
from automodel_fn.errors import ConfigError


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """What a request asks for.

    Args:
        request: "benchmark" and "device"; with "case" and "subject" that measurement is made,
            without them the environment is described.

    Raises:
        ConfigError: It names something that there is not.

    Example:
        >>> found = answer({"benchmark": "cast", "device": "cpu"})
        >>> sorted(found)
        ['absent', 'environment']
    """
    benchmark = chosen_benchmark(request["benchmark"], BENCHMARKS)
    device = request["device"]
    if "subject" not in request:
        return environment_report(benchmark, device)
    subjects = {subject.name: subject for subject in benchmark.subjects}
    name = request["subject"]
    if name not in subjects:
        raise ConfigError(f"subject={name!r} is unknown; there are: {', '.join(subjects)}.")
    (case,) = chosen_cases(benchmark, device, request["case"])
    found = subjects[name].measure(case)
    return {"values": dict(found.values), "facts": dict(found.facts)}


def main(arguments: Sequence[str]) -> None:
    """Answer the request; what a subject prints goes to the standard error."""
    with redirect_stdout(sys.stderr):
        found = answer(json.loads(arguments[0]))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
