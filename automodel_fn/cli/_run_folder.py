"""The folder of a run: each file is written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import nn

from automodel_fn.cast._plan import CastPlan
from automodel_fn.cli._report import TrainReport
from automodel_fn.convert._plan import BackendPlan
from automodel_fn.errors import ConfigError

PLAN, REPORT, PAGE, MODEL = "plan.json", "report.json", "report.html", "model"
BACKEND_PLAN = "backend_plan.json"


def check_run_folder(out: Path) -> None:
    """See that a run folder can be made there; nothing is made yet.

    Raises:
        ConfigError: It cannot be made or written to, or has something in it already.
    """
    try:
        above = next(path for path in (out, *out.absolute().parents) if path.exists())
        if not above.is_dir():
            raise ConfigError(f"out={str(out)!r} cannot be made: {str(above)!r} is no folder.")
        if not os.access(above, os.W_OK | os.X_OK):
            raise ConfigError(f"out={str(out)!r} cannot be written to: Permission denied.")
        if above == out and any(out.iterdir()):
            raise ConfigError(f"out={str(out)!r} is not empty; name a new folder.")
    except OSError as error:
        raise ConfigError(f"out={str(out)!r} cannot be written to: {error.strerror}.") from error


def make_run_folder(out: Path) -> None:
    """Make the folder.

    Raises:
        ConfigError: It cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"out={str(out)!r} cannot be made: {error.strerror}.") from error


def check_file(option: str, path: Path) -> None:
    """See that a file can be written there; nothing is written yet.

    Raises:
        ConfigError: It is a folder, its folder does not exist, or writing is not permitted.
    """
    problem = ""
    if path.is_dir():
        problem = "it is a folder"
    elif not path.parent.is_dir():
        problem = f"there is no folder {str(path.parent)!r}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        problem = "Permission denied"
    if problem:
        raise ConfigError(f"{option}={str(path)!r} cannot be written: {problem}.")


def write_file(option: str, path: Path, text: str) -> None:
    """Write a file that was asked for by an option.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option}={str(path)!r} cannot be written: {error.strerror}.") from error


def write_plan(out: Path, plan: CastPlan) -> None:
    """Write the plan's JSON."""
    _write(out / PLAN, plan.to_json())


def write_backend_plan(out: Path, plan: BackendPlan) -> None:
    """Write the JSON of the backend plan."""
    _write(out / BACKEND_PLAN, plan.to_json())


def write_report(out: Path, report: TrainReport) -> None:
    """Write the report's JSON and its page."""
    _write(out / REPORT, report.to_json())
    _write(out / PAGE, report.to_html())


def save_model(out: Path, model: nn.Module) -> str:
    """Save the model as transformers does, and return the folder's name.

    A dtype that the config would round is kept: each tensor is written as it is stored.
    """
    hf_model: Any = model
    hf_model.save_pretrained(out / MODEL)
    return MODEL


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
