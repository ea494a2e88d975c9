"""The commands: train, plan, doctor, bench."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from automodel_fn.cli import _options as options

if TYPE_CHECKING:
    from automodel_fn.cli._settings import TrainSettings

app = typer.Typer(
    name="automodel-fn",
    help="Precision for transformers: casts as plans that one can read, and a step context.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from importlib.metadata import version as version_of

        typer.echo(version_of("automodel_fn"))
        raise typer.Exit


@app.command()
def train(
    model: options.Model = None,
    data: options.Data = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 40,
    microbatches: Annotated[int, typer.Option(help="Microbatches an optimizer step.")] = 4,
    batch_size: Annotated[int, typer.Option(help="Sequences a microbatch.")] = 4,
    seq_len: Annotated[int, typer.Option(help="Tokens (bytes) a sequence.")] = 128,
    dtype: options.Dtype = "bf16",
    learning_rate: Annotated[float, typer.Option(help="AdamW's learning rate.")] = 2e-3,
    activation_checkpointing: Annotated[
        bool, typer.Option("--activation-checkpointing", help="Recompute activations.")
    ] = False,
    backend: options.Backend = None,
    attn: options.Attn = None,
    linear: options.Linear = None,
    rms_norm: options.RmsNorm = None,
    rope_fusion: options.RopeFusion = None,
    async_masks: options.AsyncMasks = None,
    swiglu: options.Swiglu = None,
    loss: options.Loss = None,
    lm_head_precision: options.HeadPrecision = None,
    experts: options.Experts = None,
    fp8: options.Fp8 = None,
    assignments: options.Set = None,
    seed: Annotated[int, typer.Option(help="Seed of weights and data order.")] = 0,
    out: options.RunFolder = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show failures only.")] = False,
    as_json: options.Json = False,
) -> None:
    """Train a causal LM under a verified precision plan, and check that the plan was kept.

    Prints the cast plan, applies it, trains with gradient accumulation, and checks itself: fp32
    pins bit-exact, every dtype as planned, each forward with its own step context, a falling loss.
    Exit code 1: a check failed. 2: an input is not usable. 130: Ctrl-C, with a readable run folder.
    """
    from automodel_fn.cli._backends import asked_backend
    from automodel_fn.cli._settings import TrainSettings

    fields = (attn, linear, rms_norm, rope_fusion, async_masks, swiglu)
    fields += (loss, lm_head_precision, experts, fp8)
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
        backend=asked_backend(backend, fields, assignments or ()),
        seed=seed,
        out=out or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S"),
    )
    _run_training(settings, is_quiet=quiet, as_json=as_json)


@app.command()
def plan(
    model: Annotated[str, typer.Argument(help="A folder with a checkpoint, or a model type.")],
    dtype: options.Dtype = "bf16",
    keep_fp32: options.KeepFp32 = None,
    skip: options.Skip = None,
    match: options.Match = "substring",
    html: options.Html = None,
    backend: options.Backend = None,
    attn: options.Attn = None,
    linear: options.Linear = None,
    rms_norm: options.RmsNorm = None,
    rope_fusion: options.RopeFusion = None,
    async_masks: options.AsyncMasks = None,
    swiglu: options.Swiglu = None,
    loss: options.Loss = None,
    lm_head_precision: options.HeadPrecision = None,
    experts: options.Experts = None,
    fp8: options.Fp8 = None,
    assignments: options.Set = None,
    as_json: options.Json = False,
) -> None:
    """Show what a cast would do to each tensor of a model; no weights are needed.

    With a backend also what would become of each module, here on this machine.
    """
    from automodel_fn.cli._backends import asked_backend
    from automodel_fn.cli._display import Display, console
    from automodel_fn.cli._plan import make_plan, plans_json

    fields = (attn, linear, rms_norm, rope_fusion, async_masks, swiglu)
    fields += (loss, lm_head_precision, experts, fp8)
    made, swaps = make_plan(
        model,
        dtype,
        keep_fp32=keep_fp32 or (),
        skip=skip or (),
        match=match,
        html=html,
        backend=asked_backend(backend, fields, assignments or ()),
    )
    if as_json:
        typer.echo(plans_json(made, swaps), nl=False)
        return
    Display(console()).plan(made)
    if swaps is not None:
        Display(console()).swaps(swaps)


@app.command()
def doctor(as_json: options.Json = False) -> None:
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


@app.command()
def bench(
    name: options.BenchmarkName = None,
    device: options.Device = "cpu",
    rounds: Annotated[int, typer.Option(help="How often everything is measured.")] = 3,
    case: options.Cases = None,
    subject: options.Subjects = None,
    stored: options.StoredResult = None,
    out: options.ResultFile = None,
    markdown: options.MarkdownFile = None,
    svg: options.SvgFile = None,
    as_json: options.Json = False,
) -> None:
    """Measure this library beside its peers, in fresh processes.

    Exit code 1: ours did not keep what it promises. 2: an input is not usable, or a worker failed.
    """
    from automodel_fn.cli import _bench, _bench_views
    from automodel_fn.cli._display import console

    if name is None and stored is None:
        if as_json:
            typer.echo(_bench.benchmarks_json(), nl=False)
            return
        for table in _bench.benchmark_lists():
            console().print(table)
        return
    _bench_views.check_views(markdown, svg)
    result = _bench.result_of(
        name,
        stored,
        device=device,
        rounds=rounds,
        cases=case or (),
        subjects=subject or (),
        out=out,
        progress=console(stderr=True),
    )
    _bench_views.write_views(result, markdown, svg)
    if as_json:
        typer.echo(result.to_json(), nl=False)
    else:
        for table in _bench_views.result_tables(result):
            console().print(table)
    if broken := _bench.broken_claims(result):
        _fail("; ".join(broken), 1)


def main() -> None:
    """Run the command line; an error of ours stands on stderr, and the exit code is 2."""
    import logging

    from automodel_fn.errors import AutomodelFnError

    logging.getLogger("automodel_fn").addHandler(logging.NullHandler())  # notes: shown as such
    try:
        app(prog_name="automodel-fn")
    except AutomodelFnError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _run_training(settings: TrainSettings, *, is_quiet: bool, as_json: bool) -> None:
    from automodel_fn.cli._display import Display, console
    from automodel_fn.cli._train import train as run

    display = Display(console(stderr=as_json), is_quiet=is_quiet or as_json)
    try:
        report = run(settings, display)
    except KeyboardInterrupt:
        _fail(f"interrupted; what there is stands in {settings.out}", 130)
    if as_json:
        typer.echo(report.to_json(), nl=False)
    if report.failed:
        _fail("; ".join(f"check failed: {c.claim} ({c.evidence})" for c in report.failed), 1)


def _fail(message: str, code: int) -> NoReturn:
    sys.stderr.write(f"automodel-fn: {message}\n")
    sys.exit(code)
