"""The report of a training run: a value, its JSON, its HTML page."""

from __future__ import annotations

import json
import math
from typing import Any

import attrs

from automodel_fn.cast._plan import CastPlan
from automodel_fn.cli._checks import Check
from automodel_fn.cli._settings import TrainSettings
from automodel_fn.render._curve import curve_svg
from automodel_fn.render._groups import summary
from automodel_fn.render._page import page, section, text_table
from automodel_fn.render._plan_html import plan_sections

_CLASSES = {True: "ok", False: "failed", None: "open"}


@attrs.frozen
class TrainReport:
    """What a run did.

    Args:
        settings: What it was asked.
        status: "running", "finished", "interrupted" or "failed".
        plan: The cast plan that was applied.
        versions: Names and versions of what it ran on.
        model_name: Class of the model and its number of parameters, in words.
        losses: Mean loss of each optimizer step.
        fixed_loss: Loss on the fixed batch, before and after; None where it was not measured.
        tokens_per_second: Mean over the loop.
        num_tokens: Tokens trained on.
        checks: The checks.
        model_folder: Where the model was saved, within the run folder; "" if it was not.
    """

    settings: TrainSettings
    status: str = attrs.field(kw_only=True)
    plan: CastPlan = attrs.field(kw_only=True)
    versions: tuple[tuple[str, str], ...] = attrs.field(kw_only=True)
    model_name: str = attrs.field(kw_only=True)
    losses: tuple[float, ...] = attrs.field(default=(), kw_only=True)
    fixed_loss: tuple[float | None, float | None] = attrs.field(default=(None, None), kw_only=True)
    tokens_per_second: float = attrs.field(default=0.0, kw_only=True)
    num_tokens: int = attrs.field(default=0, kw_only=True)
    checks: tuple[Check, ...] = attrs.field(default=(), kw_only=True)
    model_folder: str = attrs.field(default="", kw_only=True)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that failed."""
        return tuple(check for check in self.checks if check.passed is False)

    def to_json(self) -> str:
        """The report as JSON text; the plan stands in a file of its own."""
        data: dict[str, Any] = {
            "format": "automodel_fn.train_report/1",
            "status": self.status,
            "settings": self.settings.to_dict(),
            "versions": dict(self.versions),
            "model": self.model_name,
            "model_folder": self.model_folder,
            "plan": summary(self.plan.rows()),
            "notes": list(self.plan.notes),
            "losses": [_finite(loss) for loss in self.losses],
            "fixed_loss": {
                "before": _finite(self.fixed_loss[0]),
                "after": _finite(self.fixed_loss[1]),
            },
            "tokens_per_second": self.tokens_per_second,
            "num_tokens": self.num_tokens,
            "checks": [attrs.asdict(check) for check in self.checks],
        }
        return json.dumps(data, indent=1) + "\n"

    def to_html(self) -> str:
        """The report as one self-contained page."""
        steps = f"{len(self.losses)} of {self.settings.steps} steps"
        lead = f"{self.status}: {self.model_name}, {steps}"
        facts = [(name, str(value)) for name, value in self.settings.to_dict().items()]
        return page(
            "Training run",
            lead,
            (
                section("Checks", _checks(self.checks)),
                section("Loss", _curve(self)),
                *plan_sections(self.plan),
                section("Settings", text_table(("setting", "value"), facts)),
                section("Versions", text_table(("package", "version"), self.versions)),
            ),
        )


def _finite(value: float | None) -> float | None:
    """JSON has no NaN and no infinity: null stands for them."""
    return value if value is not None and math.isfinite(value) else None


def _checks(checks: tuple[Check, ...]) -> str:
    if not checks:
        return "<p>The run ended before its checks.</p>"
    table = text_table(("verdict", "claim", "evidence"), [_cells(check) for check in checks])
    for check in checks:
        cell = f"<td>{check.verdict}</td>"
        table = table.replace(cell, f'<td class="{_CLASSES[check.passed]}">{check.verdict}</td>')
    return table


def _cells(check: Check) -> tuple[str, str, str]:
    return check.verdict, check.claim, check.evidence


def _curve(report: TrainReport) -> str:
    if not report.losses:
        return "<p>No optimizer step was completed.</p>"
    before, after = report.fixed_loss
    marks = [(1, before)] if before is not None else []
    marks += [(len(report.losses), after)] if after is not None else []
    svg = curve_svg(
        report.losses, x_label="optimizer step", y_label="loss (nats a token)", marks=marks
    )
    speed = f"{report.tokens_per_second:,.0f} tokens a second, {report.num_tokens:,} tokens"
    return f"<figure>{svg}</figure><p>{speed}</p>"
