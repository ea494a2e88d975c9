"""The folder of a run: each file is written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from automodel_fn.cast._plan import CastPlan
from automodel_fn.cli._report import TrainReport
from automodel_fn.errors import ConfigError

PLAN, REPORT, PAGE, MODEL = "plan.json", "report.json", "report.html", "model"


def make_run_folder(out: Path) -> None:
    """Make the folder, and see that it can be written to.

    Raises:
        ConfigError: It cannot be made or written to, or has something in it already.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ConfigError(f"out={str(out)!r} is not empty; name a new folder.")
        probe = out / ".probe"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"out={str(out)!r} cannot be written to: {error.strerror}.") from error


def write_plan(out: Path, plan: CastPlan) -> None:
    """Write the plan's JSON."""
    _write(out / PLAN, plan.to_json())


def write_report(out: Path, report: TrainReport) -> None:
    """Write the report's JSON and its page."""
    _write(out / REPORT, report.to_json())
    _write(out / PAGE, report.to_html())


def save_model(out: Path, model: nn.Module) -> str:
    """Save the model as transformers does, and return the folder's name.

    A dtype that the config would round is kept: each tensor is written as it is stored.
    """
    model.save_pretrained(out / MODEL)  # pyright: ignore
    return MODEL


def _write(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
