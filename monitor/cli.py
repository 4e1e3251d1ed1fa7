"""The `repflow` command. Each command imports what it needs when it is called, so that `--help` answers at once."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import repflow

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Watch how a language model's token representations flow through depth while it trains.",
    epilog="Errors are one line; with REPFLOW_TRACEBACK=1 in the environment they come with their traceback.",
)


def _tracebacks_wanted() -> bool:
    return os.environ.get("REPFLOW_TRACEBACK", "0") not in ("", "0")


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    """Show what the user can mend as one red line and exit with 2."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        if _tracebacks_wanted():
            raise
        typer.secho(f"repflow: {' '.join(str(error).split())}", fg="red", err=True)
        raise typer.Exit(2) from error


def _print_version(wanted: bool) -> bool:
    if wanted:
        typer.echo(f"repflow {repflow.__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """The options before the command."""


@app.command()
def demo(
    model: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Train only this: transformer, ssm or hybrid; may be given more than once."),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps per model. Default: by size.")] = None,
    every: Annotated[
        int | None, typer.Option(help="Optimizer steps between snapshots. Default: for up to 20 snapshots.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the weights and of the order of the text.")] = 0,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Size of the models: small, medium or large, about 1.5, 30 or 160 million parameters; the larger two "
            "are meant for a GPU. Default: small on a CPU, medium on a GPU.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A shorter training, to see that everything works.")] = False,
    text: Annotated[
        Path | None,
        typer.Option(help="A file or folder to learn from. Default: the source of Python's standard library."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for run files, W&B runs and the report.")] = Path("repflow-demo"),
) -> None:
    """Train a transformer, a state-space model and a hybrid of both, and compare how representations flow.

    They learn to predict text byte by byte under repflow's Lightning callback. At the end there are a table, a run file
    per model, and a report in one HTML page. W&B runs are kept offline unless you are logged in or WANDB_MODE says
    otherwise. With small models this takes some minutes on a laptop.
    """
    with _errors_in_one_line():
        from repflow.monitor.demo.run import Demo, run_demo

        chosen = Demo.of_size(
            size,
            models=model or (),
            steps=steps,
            quick=quick,
            every_n_steps=every,
            seed=seed,
            text=text,
            folder=out,
        )
        result = run_demo(chosen)
    for outcome in result.outcomes:
        if outcome.error is not None and _tracebacks_wanted():
            raise outcome.error
    raise typer.Exit(result.exit_code)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run files, such as repflow-runs/NAME.db.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page to write.")] = Path("report.html"),
) -> None:
    """Write one HTML page that shows runs side by side; it opens without network. A run may still be under way."""
    with _errors_in_one_line():
        from repflow.monitor.report import write_report

        page = write_report(runs, output)
    typer.echo(page)
