"""The command plan: a cast of a model and its backends, shown and not done."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from automodel_fn.backend._config import BackendConfig
from automodel_fn.cast._plan import CastPlan
from automodel_fn.cast._planners import cast_plan
from automodel_fn.cli._models import meta_model
from automodel_fn.cli._run_folder import check_file, write_file
from automodel_fn.convert._plan import BackendPlan
from automodel_fn.convert._planner import backend_plan
from automodel_fn.dtypes import parse_castable
from automodel_fn.render._plan_html import plan_html


def make_plan(
    model: str,
    dtype: str,
    *,
    keep_fp32: Sequence[str] = (),
    skip: Sequence[str] = (),
    match: str = "substring",
    html: Path | None = None,
    backend: BackendConfig | None = None,
) -> tuple[CastPlan, BackendPlan | None]:
    """The cast plan of a model on the meta device, and the plan of a backend if one is given.

    Args:
        model: A folder with a checkpoint, or a model type.
        dtype: Name of the target dtype.
        keep_fp32: Patterns of what stays in float32.
        skip: Patterns of what is left alone.
        match: How declared keywords match.
        html: Where to write the cast plan as a page.
        backend: Which backend runs which modules, on this machine.

    Raises:
        ConfigError: An argument cannot be met.
        BackendUnavailableError: The backend cannot run here.
    """
    target = parse_castable(dtype)
    if html is not None:
        check_file("html", html)
    found = meta_model(model)
    made = cast_plan(found, target, keep_fp32=keep_fp32, skip=skip, match=match)
    if html is not None:
        write_file("html", html, plan_html(made, f"Cast plan of {model}"))
    return made, None if backend is None else backend_plan(found, backend)


def plans_json(cast: CastPlan, swaps: BackendPlan | None) -> str:
    """The cast plan as JSON text; with a backend, an object of both plans."""
    if swaps is None:
        return cast.to_json()
    return f'{{"cast_plan": {cast.to_json()}, "backend_plan": {swaps.to_json()}}}\n'
