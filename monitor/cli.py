"""The `repflow` command. Each command imports what it needs when it is called, so that `--help` answers at once."""

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Annotated

import typer

import repflow
from repflow.monitor.offline.reproduce.arguments import reproduce

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Watch how a language model's token representations flow through depth while it trains.",
    epilog="Errors come without their traceback, unless REPFLOW_TRACEBACK=1 is in the environment.",
)


def _path(given: str | Path) -> Path:
    """A path of the command line. `Path("")` would be the working directory."""
    if not str(given):
        raise typer.BadParameter("expected a path, got an empty text")
    return Path(given)


def _tracebacks_wanted() -> bool:
    return os.environ.get("REPFLOW_TRACEBACK", "0") not in ("", "0")


@contextmanager
def _without_traceback() -> Iterator[None]:
    """Show what the user can mend in red, each line of the message on one of its own, and exit with 2."""
    try:
        yield
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if _tracebacks_wanted() or not _can_be_mended(error):
            raise
        for line in str(error).splitlines():
            typer.secho(f"repflow: {line}", fg="red", err=True)
        raise typer.Exit(2) from error


def _can_be_mended(error: Exception) -> bool:
    """Whether it is of the user's making; any other `ValueError` is a bug."""
    if not isinstance(error, ValueError):
        return True
    from repflow.monitor.demo import DemoError
    from repflow.monitor.inspection import InspectError
    from repflow.monitor.offline import OfflineError
    from repflow.monitor.sinks import RunFileError

    return isinstance(error, (DemoError, InspectError, OfflineError, RunFileError))


def _print_what_the_terminal_can() -> None:
    """A character that its encoding lacks becomes a question mark, and ends nothing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")


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
    _print_what_the_terminal_can()


_Size = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Size of the models: small, medium or large, about 1.5, 30 or 160 million parameters; the larger two "
        "are meant for a GPU. Default: small on a CPU, medium on a GPU.",
    ),
]
_Text = Annotated[
    Path | None,
    typer.Option(
        parser=_path,
        metavar="PATH",
        help="A file or folder to learn from. Default: the source of Python's standard library.",
    ),
]


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
    size: _Size = None,
    quick: Annotated[bool, typer.Option("--quick", help="A shorter training, to see that everything works.")] = False,
    text: _Text = None,
    out: Annotated[
        Path, typer.Option(parser=_path, metavar="PATH", help="Folder for run files, W&B runs and the report.")
    ] = Path("repflow-demo"),
) -> None:
    """Train a transformer, a state-space model and a hybrid of both, and compare how representations flow.

    They learn to predict text byte by byte under repflow's Lightning callback. At the end there are a table, a run file
    per model, and a report in one HTML page. W&B runs are kept offline unless you are logged in or WANDB_MODE says
    otherwise. With small models this takes some minutes on a laptop.
    """
    with _without_traceback():
        from repflow.monitor.demo.options import Demo
        from repflow.monitor.demo.run import run_demo

        fields = {"steps": steps, "every_n_steps": every, "seed": seed, "text": text, "folder": out}
        result = run_demo(Demo.of_size(size, models=model or (), quick=quick, **fields))
    if result.errors and _tracebacks_wanted():
        raise result.errors[0]
    raise typer.Exit(result.exit_code)


_Runs = Annotated[
    list[Path], typer.Argument(parser=_path, metavar="RUN...", help="Run files, such as repflow-runs/NAME.db.")
]
_Baselines = Annotated[
    list[Path] | None,
    typer.Option(
        "--baseline",
        parser=_path,
        metavar="RUN",
        help="A run file whose first snapshot is drawn beside the runs: the same model with random weights, say. May "
        "be given more than once.",
    ),
]


@app.command()
def report(
    runs: _Runs,
    output: Annotated[
        Path, typer.Option("--output", "-o", parser=_path, metavar="PATH", help="The page to write.")
    ] = Path("report.html"),
    baseline: _Baselines = None,
) -> None:
    """Write one HTML page that shows runs side by side; it opens without network. A run may still be under way."""
    with _without_traceback():
        page = _write_report(runs, output, baseline or [])
    typer.echo(page)


@app.command()
def watch(
    runs: _Runs,
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0 for any that is free.")] = 8714,
    baseline: _Baselines = None,
) -> None:
    """Serve the page of `repflow report` on this machine, where it follows runs while they train. Ctrl-C ends it.

    A run file need not exist yet. Where training runs on another machine, an SSH tunnel brings the page to this one:
    ssh -L 8714:127.0.0.1:8714 MACHINE
    """
    with _without_traceback():
        from repflow.monitor.report import watch_runs

        watch_runs(runs, port=port, baselines=baseline or [], announce=typer.echo)


def _write_report(runs: Sequence[Path], output: Path, baselines: Sequence[Path]) -> Path:
    from repflow.monitor.report import write_report

    if output.is_dir():
        raise IsADirectoryError(f"--output: expected a file to write, and {output} is a folder")
    if output.resolve() in {run.resolve() for run in (*runs, *baselines)}:
        raise FileExistsError(f"--output: expected a page to write, and {output} is one of the run files")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        page = write_report(runs, output, baselines=baselines)
    for warning in caught:
        typer.echo(warning.message, err=True)
    return page


@app.command()
def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL_OR_CONFIG",
            help="A class (LlamaConfig, LlamaForCausalLM) or model type (llama) of transformers; a folder or JSON file "
            "with a configuration; owner/name on the Hugging Face hub; or package.module:factory.",
        ),
    ],
    stream: Annotated[
        str | None, typer.Option(metavar="NAME", help="Which one, in a model with two: encoder or decoder.")
    ] = None,
    blocks: Annotated[
        str | None, typer.Option(metavar="PATH", help="Dotted path of the list of blocks. Default: found by itself.")
    ] = None,
) -> None:
    """Show the residual stream of a model: its blocks, what they are made of, and how their states are read.

    Only the configuration is read, and where it can be, the model is built without memory for its weights.
    """
    with _without_traceback(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _show_stream(model, stream, blocks)


@app.command()
def dashboard(
    project: Annotated[str, typer.Option(help="W&B project whose runs it shows.")] = "repflow",
    entity: Annotated[str, typer.Option(help="User or team that the project belongs to; needed to save.")] = "",
    name: Annotated[str, typer.Option(help="Name of the workspace.")] = "repflow",
    save: Annotated[bool, typer.Option("--save", help="Save it to W&B as a new view, and print its address.")] = False,
) -> None:
    """Make a W&B workspace for monitored runs: overview, depth, CKA and alerts.

    Without --save nothing is sent: the specification is printed as JSON.
    """
    with _without_traceback():
        from repflow.monitor.sinks.dashboard import build_dashboard, dashboard_spec, save_dashboard

        if save and not entity:
            raise typer.BadParameter("expected the user or team that the project belongs to", param_hint="--entity")
        if save:
            typer.echo(save_dashboard(project, entity=entity, name=name))
        else:
            typer.echo(dashboard_spec(build_dashboard(project, entity=entity, name=name)))


@app.command()
def tasks(
    task: Annotated[
        list[str] | None, typer.Argument(metavar="[TASK]...", help="kvpr, mdqa, or both, which is the default.")
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="NAME_OR_PATH", help="Of a model, with its window: a folder, or owner/name on the hub."),
    ] = None,
    length: Annotated[
        list[str] | None, typer.Option(metavar="TOKENS", help="300, 1K, 2K, 4K …; may be given more than once.")
    ] = None,
    items: Annotated[int | None, typer.Option(help="Pairs or documents of a prompt, instead of a length.")] = None,
    samples: Annotated[int, typer.Option(help="How many to show of each.")] = 1,
    classes: Annotated[int | None, typer.Option(help="Tested gold positions. Default: 11, or all.")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the samples.")] = 0,
    data: Annotated[
        Path | None,
        typer.Option(parser=_path, metavar="PATH", help="Questions for MDQA, .jsonl.gz. Default: downloaded once."),
    ] = None,
    whole: Annotated[bool, typer.Option("--whole", help="Show prompts whole.")] = False,
) -> None:
    """Show samples of the tasks on which models are analysed: key-value retrieval and multi-document questions."""
    with _without_traceback():
        from rich.console import Console

        from repflow.monitor.offline.tasks_command import TASKS, TaskChoices, show_tasks

        options = {"items": items, "samples": samples, "seed": seed, "classes": classes, "data": data, "whole": whole}
        choices = TaskChoices(tasks=task or TASKS, lengths=length or ["300"], tokenizer=tokenizer, **options)
        show_tasks(choices, Console())


app.command()(_without_traceback()(reproduce))


def _show_stream(model: str, stream: str | None, blocks: str | None) -> None:
    from rich.console import Console

    from repflow.monitor.inspection import inspect_model, show

    console = Console()
    if not console.is_terminal:
        console = Console(width=_FILE_WIDTH)
    show(console, inspect_model(model, stream=stream, blocks=blocks))


_FILE_WIDTH = 160  # wide enough that no name is cut where nobody's terminal sets the width
