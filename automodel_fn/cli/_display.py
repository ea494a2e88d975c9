"""What a run shows: everything through one object, so that it can be silent."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from automodel_fn.cast._plan import CastPlan
from automodel_fn.cli._report import TrainReport
from automodel_fn.convert._plan import BackendPlan
from automodel_fn.render._swap_table import swap_table
from automodel_fn.render._table import plan_table, simple_table

_LOG_WIDTH = 120


def console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal; in a log or a pipe, where nobody resizes, 120 columns."""
    found = Console(stderr=stderr)
    return found if found.is_terminal else Console(stderr=stderr, width=_LOG_WIDTH)


class Display:
    """Shows a run on a console; a quiet one shows failures only."""

    def __init__(self, console: Console, *, is_quiet: bool = False) -> None:
        self._console = console
        self._is_quiet = is_quiet

    def plan(self, plan: CastPlan) -> None:
        """Show the plan and its notes."""
        if not self._is_quiet:
            self._console.print(plan_table(plan))
        for note in plan.notes:
            self.remark(f"note: {note}")

    def swaps(self, plan: BackendPlan) -> None:
        """Show a backend plan and its notes."""
        if not self._is_quiet:
            self._console.print(swap_table(plan))
        for note in plan.notes:
            self.remark(f"note: {note}")

    def remark(self, text: str) -> None:
        """Show one line."""
        if not self._is_quiet:
            self._console.print(Text(text), soft_wrap=True)

    @contextmanager
    def training(self, num_steps: int) -> Generator[Callable[[int, float, float], None]]:
        """Show the progress of training; yields what to call after each optimizer step."""
        columns = (
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, disable=self._is_quiet) as progress:
            task = progress.add_task("training", total=num_steps, loss=float("nan"), speed=0.0)
            yield lambda done, loss, speed: progress.update(
                task, completed=done, loss=loss, speed=speed
            )

    def report(self, report: TrainReport) -> None:
        """Show the checks and where the files are; a quiet display shows failures."""
        shown = report.failed if self._is_quiet else report.checks
        if shown:
            rows = [(check.verdict, check.claim, check.evidence) for check in shown]
            self._console.print(simple_table("Checks", ("verdict", "claim", "evidence"), rows))
        self.remark(f"{report.status}: {report.settings.out / 'report.html'}")
