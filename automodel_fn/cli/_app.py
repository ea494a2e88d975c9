"""The commands: train, plan, doctor, bench."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="automodel-fn",
    help="Precision for transformers: casts as plans that one can read, and a step context.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Dtype = Annotated[str, typer.Option(help="Target dtype: bf16, fp16 or fp32.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout, and nothing else there.")]


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from automodel_fn import __version__

        typer.echo(__version__)
        raise typer.Exit


@app.command()
def train(
    model: Annotated[
        str | None,
        typer.Option(
            help="A folder with a checkpoint, or a transformers model type with a shrunken config. "
            "Without it: a small DeepSeek-V3 style mixture of experts.",
            show_default=False,
        ),
    ] = None,
    data: Annotated[
        list[Path] | None,
        typer.Option(
            help="Files or folders to read as bytes (repeatable). Without it: the source of "
            "Python's standard library.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 60,
    microbatches: Annotated[int, typer.Option(help="Microbatches an optimizer step.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Sequences a microbatch.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens (bytes) a sequence.")] = 128,
    dtype: Dtype = "bf16",
    learning_rate: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 2e-3,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Recompute activations.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
    out: Annotated[
        Path | None,
        typer.Option(help="Run folder; new or empty. [default: runs/DATE-TIME]", show_default=False),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show failures only.")] = False,
    as_json: Json = False,
) -> None:
    """Train a causal LM under a verified precision plan, and check that the plan was kept.

    Prints the cast plan, applies it, trains with gradient accumulation, and checks itself: fp32
    pins bit-exact, every dtype as planned, each forward with its own step context, a falling loss.
    Exit code 1: a check failed. 2: an input is not usable. 130: Ctrl-C, with a readable run folder.
    """
    from automodel_fn.cli._display import Display, console
    from automodel_fn.cli._settings import TrainSettings
    from automodel_fn.cli._train import train as run

    settings = TrainSettings(
        model=model,
        data=tuple(data or ()),
        steps=steps,
        microbatches=microbatches,
        batch_size=batch_size,
        seq_len=seq_len,
        dtype=dtype,
        activation_checkpointing=activation_checkpointing,
        learning_rate=learning_rate,
        seed=seed,
        out=out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S"),
    )
    display = Display(console(stderr=as_json), is_quiet=quiet or as_json)
    report = run(settings, display)
    if as_json:
        typer.echo(report.to_json(), nl=False)
    if report.failed:
        _fail("; ".join(f"check failed: {c.claim} ({c.evidence})" for c in report.failed), 1)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A folder with a checkpoint, or a model type.")],
    dtype: Dtype = "bf16",
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option(help="Keep in fp32: an FQN, a glob or re:... (repeatable).", show_default=False),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(help="Leave alone, in the same grammar (repeatable).", show_default=False),
    ] = None,
    match: Annotated[
        str, typer.Option(help="How declared keywords match: substring, segment or hf.")
    ] = "substring",
    html: Annotated[
        Path | None, typer.Option(help="Also write the plan as a page.", show_default=False)
    ] = None,
    as_json: Json = False,
) -> None:
    """Show what a cast would do to each tensor of a model; on the meta device, no weights needed."""
    from automodel_fn.cast._planners import cast_plan
    from automodel_fn.cli._display import Display, console
    from automodel_fn.cli._models import meta_model
    from automodel_fn.errors import ConfigError
    from automodel_fn.render._plan_html import plan_html

    made = cast_plan(
        meta_model(model), dtype, keep_fp32=keep_fp32 or (), skip=skip or (), match=match
    )
    if html is not None:
        try:
            html.write_text(plan_html(made, f"Cast plan of {model}"), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"html={str(html)!r} cannot be written: {error.strerror}.") from error
    if as_json:
        typer.echo(made.to_json(), nl=False)
    else:
        Display(console()).plan(made)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, devices, and which backends can run here and why not."""
    from automodel_fn.backend._probe import probe
    from automodel_fn.cli._display import console
    from automodel_fn.cli._doctor import availability_json, availability_tables

    found = probe()
    if as_json:
        typer.echo(availability_json(found), nl=False)
        return
    for table in availability_tables(found):
        console().print(table)


def main() -> None:
    """Run the command line; an error of ours is one line on stderr and exit code 2."""
    from automodel_fn.errors import AutomodelFnError

    try:
        app()
    except AutomodelFnError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> Any:
    sys.stderr.write(f"automodel-fn: {message}\n")
    sys.exit(code)
