"""The main job: plan, apply, train, check, and leave a folder that says so."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from typing import Any

import attrs
import torch
from torch import nn

from automodel_fn.backend._probe import probe
from automodel_fn.cast._entries import KEEP
from automodel_fn.cast._plan import CastPlan
from automodel_fn.cast._planners import cast_plan
from automodel_fn.cast._tensors import scan
from automodel_fn.cli import _checks as checks
from automodel_fn.cli._configs import check_source, quiet_transformers
from automodel_fn.cli._cpu import products_in_float32
from automodel_fn.cli._display import Display
from automodel_fn.cli._models import build_model, check_length, recompute, reload_model
from automodel_fn.cli._report import TrainReport
from automodel_fn.cli._run_folder import (
    check_run_folder,
    make_run_folder,
    save_model,
    write_backend_plan,
    write_plan,
    write_report,
)
from automodel_fn.cli._settings import TrainSettings
from automodel_fn.cli._text import batches, read_bytes
from automodel_fn.cli._training import History, evaluate, fill_pins, train_steps
from automodel_fn.convert._planner import backend_plan
from automodel_fn.plans import apply

Cast = Callable[[CastPlan, nn.Module], Any]


def train(settings: TrainSettings, display: Display, cast: Cast = apply) -> TrainReport:
    """Train a causal LM under a verified precision plan.

    Args:
        settings: What to do.
        display: Where to show it.
        cast: What carries the plan out. A test puts a plain `model.to(bf16)` in its place, and the
            checks must notice.

    Returns:
        The report; it also stands in the run folder, which holds plan, report, page and model.

    Raises:
        ConfigError: A setting cannot be met.
        KeyboardInterrupt: Ctrl-C; the run folder is readable.
    """
    check_run_folder(settings.out)
    text = read_bytes(settings.data)
    stream = batches(text, settings.batch_size, settings.seq_len, settings.seed)
    fixed = next(stream)
    check_source(settings.model)
    torch.manual_seed(settings.seed)
    model, is_fresh = build_model(settings.model)
    check_length(model, settings.seq_len)
    if settings.activation_checkpointing:
        recompute(model)
    swaps = None if settings.backend is None else backend_plan(model, settings.backend)
    if swaps is not None:
        display.swaps(swaps)
        apply(swaps)
    plan = cast_plan(model, settings.dtype)
    if is_fresh:
        fill_pins(_pins(model, plan), settings.seed)
    make_run_folder(settings.out)
    if swaps is not None:
        write_backend_plan(settings.out, swaps)
    run = _Run(settings, display, model, plan, fixed)
    run.begin()
    try:
        run.cast(cast)
        with products_in_float32(settings.dtype, display.remark), quiet_transformers():
            run.train(islice(stream, settings.steps * settings.microbatches))
            return run.finish("finished")
    except KeyboardInterrupt:
        quietly = products_in_float32(settings.dtype, lambda _: None)
        with suppress(KeyboardInterrupt), quietly, quiet_transformers():
            run.finish("interrupted")
        raise


@attrs.define
class _Run:
    """One run, from the cast model to the report."""

    settings: TrainSettings
    display: Display
    model: Any
    plan: CastPlan
    fixed: torch.Tensor
    history: History = attrs.field(factory=History)
    exact: checks.Check | None = None
    before: float | None = None

    def begin(self) -> None:
        """Show the plan, and leave a folder that can be read whatever happens."""
        write_plan(self.settings.out, self.plan)
        self._write("running")
        self.display.plan(self.plan)

    def cast(self, cast: Cast) -> None:
        """Carry the plan out, and look at once whether the pins are what they were."""
        expected = checks.pin_bits(self.model, self.plan)
        cast(self.plan, self.model)
        self.exact = checks.check_pins_exact(self.model, expected)

    def train(self, stream: Any) -> None:
        """Train on the stream, with the loss on the fixed batch before it."""
        settings = self.settings
        self.before = evaluate(self.model, self.fixed)
        optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=settings.learning_rate, weight_decay=0.01
        )
        warmup = max(1, settings.steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda done: min(1.0, (done + 1) / warmup)
        )
        with self.display.training(settings.steps) as show:

            def on_step(done: int, loss: float, speed: float) -> None:
                schedule.step()
                show(done, loss, speed)

            train_steps(self.model, optimizer, stream, settings.microbatches, self.history, on_step)

    def finish(self, status: str) -> TrainReport:
        """Check everything, save the model, write the report."""
        done = len(self.history.losses)
        after = evaluate(self.model, self.fixed) if done else None
        found = self._checks(done, after) if self.exact else ()
        if status == "interrupted":  # a second Ctrl-C may come while the model is saved
            self._write(status, found, after)
        folder = save_model(self.settings.out, self.model) if done else ""
        if folder:
            loaded = reload_model(self.settings.out / folder)
            found = (*found, checks.check_saved(self.model, loaded))
        if status == "finished" and any(check.passed is False for check in found):
            status = "failed"
        report = self._write(status, found, after, folder)
        self.display.report(report)
        return report

    def _checks(self, done: int, after: float | None) -> tuple[checks.Check, ...]:
        num_microbatches = done * self.settings.microbatches
        recomputes = self.history.num_recompute_reads
        assert self.exact is not None
        return (
            self.exact,
            checks.check_pins_fp32(self.model, self.plan),
            checks.check_dtypes(self.model, self.plan),
            checks.check_steps(
                self.history.expected[:num_microbatches],
                self.history.seen[:num_microbatches],
                recomputes if self.settings.activation_checkpointing else None,
            ),
            checks.check_loss(self.before or 0.0, after, done),
        )

    def _write(
        self,
        status: str,
        found: tuple[checks.Check, ...] = (),
        after: float | None = None,
        folder: str = "",
    ) -> TrainReport:
        report = TrainReport(
            self.settings,
            status=status,
            plan=self.plan,
            versions=_versions(),
            model_name=_name(self.model),
            losses=tuple(self.history.losses),
            fixed_loss=(self.before, after),
            tokens_per_second=self.history.num_tokens / max(self.history.seconds, 1e-9),
            num_tokens=self.history.num_tokens,
            checks=found,
            model_folder=folder,
        )
        write_report(self.settings.out, report)
        return report


def _pins(model: nn.Module, plan: CastPlan) -> list[torch.Tensor]:
    pinned = {e.name for e in plan.entries if e.action == KEEP and not e.changes}
    return [item.tensor for item in scan(model).tensors if item.names[0] in pinned]


def _name(model: nn.Module) -> str:
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return f"{type(model).__name__}, {millions:.1f} M parameters"


def _versions() -> tuple[tuple[str, str], ...]:
    found = probe()
    devices = ", ".join(device.name for device in found.devices) or "CPU"
    packages = [(p.name, p.version) for p in found.packages if p.version is not None]
    return (("python", found.python), ("torch", found.torch), *packages, ("device", devices))
