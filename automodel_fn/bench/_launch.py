"""Start a worker and read its answer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from typing import Any

from automodel_fn.errors import BenchmarkError, itemized

_WORKER = "automodel_fn.bench._worker"
_LINES_SHOWN = 12
_TIMEOUT_S = 1200


def launch(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of a fresh process to one request; see `_worker`.

    Raises:
        BenchmarkError: The process failed; with its last lines on the standard error.
    """
    command = [sys.executable, "-m", _WORKER, json.dumps(request)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise _failed(request, f"took more than {_TIMEOUT_S} s", error.stderr) from None
    if done.returncode:
        raise _failed(request, f"ended with exit status {done.returncode}", done.stderr)
    try:
        return json.loads(done.stdout)
    except ValueError:
        raise _failed(request, f"printed {done.stdout[-200:]!r}, no JSON", done.stderr) from None


def _failed(request: Mapping[str, Any], how: str, stderr: str | bytes | None) -> BenchmarkError:
    text = stderr.decode(errors="replace") if isinstance(stderr, bytes) else stderr or ""
    about = ", ".join(f"{key}={value!r}" for key, value in request.items())
    return BenchmarkError(
        itemized(
            f"{about}: the worker {how}; the last lines of its standard error:",
            text.splitlines()[-_LINES_SHOWN:],
            f"Nothing was skipped: the run ends here. Repeat it with python -m {_WORKER} "
            f"'{json.dumps(request)}'",
        )
    )
