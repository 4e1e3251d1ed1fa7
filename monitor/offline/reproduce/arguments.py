"""The arguments of `repflow reproduce`. What does it is imported when it is called: `--help` answers at once."""

from pathlib import Path
from typing import Annotated, Any

import typer

_MODEL = typer.Option(
    metavar="NAME_OR_PATH",
    help="owner/name on the Hugging Face hub, a folder with a checkpoint, or gpt-neo-2.7b, pythia-2.8b, mamba-2.8b, "
    "mamba2-2.7b, mamba2-130m. May be given more than once. Default: the first four.",
)
_FOLDER = typer.Option("--output", "-o", metavar="FOLDER", help="Where results and work are kept.")


def reproduce(
    target: Annotated[
        list[str],
        typer.Argument(
            metavar="TARGET...",
            help="Some of figure1 … figure7, table1, table2, or all. `draw FOLDER` draws the pictures of what is in a "
            "folder, `report FOLDER` joins all in one page.",
        ),
    ],
    model: Annotated[list[str] | None, _MODEL] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Branch, tag or commit of models on the hub, such as step1000.")
    ] = None,
    init: Annotated[
        bool, typer.Option("--init", help="Take configurations alone, and weights drawn from them.")
    ] = False,
    length: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKENS", help="300, 1K, 2K, 4K …; may be given more than once. Default: the paper's."),
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(help="kvpr or mdqa; may be given more than once. Default: both.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(metavar="PATH", help="Questions for MDQA, .jsonl.gz. Default: downloaded once.")
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(help="Prompts of each task and length. Default: 20,000 for probes, else 512; 8 of random ids."),
    ] = None,
    prompt_seed: Annotated[int, typer.Option(help="Seed of the prompts.")] = 0,
    classes: Annotated[int | None, typer.Option(help="Tested gold positions. Default: 11, or all.")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="How many. Default: 3 of models drawn at random, 5 of probes.")
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(help="Prompts: task, or random_ids, which need no tokenizer. Default: task for checkpoints."),
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(metavar="NAME_OR_PATH", help="Where it does not lie beside the model.")
    ] = None,
    states: Annotated[
        str | None,
        typer.Option(
            help="Of the last block: residual, before the final norm, or hf, after it. Default: residual; hf with "
            "--probes released."
        ),
    ] = None,
    cka: Annotated[str, typer.Option(help="Estimator: unbiased or biased.")] = "unbiased",
    probes: Annotated[
        str,
        typer.Option(
            help="Protocol of probes: paper, or released, whose samples show each context at every tested position: "
            "20,000 are 1,818 contexts at 11."
        ),
    ] = "paper",
    policy: Annotated[
        list[str] | None,
        typer.Option(help="Of biases and norm affines: default, trivial, scheme; more than once. Default: all."),
    ] = None,
    scheme: Annotated[
        list[str] | None,
        typer.Option(help="Of matrices: default, gaussian, xavier, kaiming; more than once. Default: all."),
    ] = None,
    embeddings: Annotated[str, typer.Option(help="Drawn by the scheme, or default.")] = "scheme",
    positions: Annotated[str, typer.Option(help="Learned positions: drawn by the scheme, or default.")] = "scheme",
    scaled_positions: Annotated[
        bool, typer.Option("--scaled-positions", help="In figure 7 scale learned positions too.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(help="float32, bfloat16, float16. Default: the checkpoint's; float32 for what is drawn."),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 … Default: a GPU if there is one.")] = None,
    device_map: Annotated[
        str | None, typer.Option(help="auto: spread a checkpoint over all GPUs (needs accelerate).")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Most tokens of one forward, padding included.")] = 16384,
    output: Annotated[Path, _FOLDER] = Path("repflow-paper"),
    force: Annotated[bool, typer.Option("--force", help="Measure anew what is there already.")] = False,
    no_pictures: Annotated[
        bool, typer.Option("--no-pictures", help="Write data only; `reproduce draw` draws it, elsewhere too.")
    ] = False,
) -> None:
    """Reproduce the figures and tables of arXiv 2510.06640 on any checkpoint, or on models drawn at random.

    Each target writes its data, a JSON file that states every choice, and pictures. Figures 3, 5, 6 and 7 need a
    configuration alone: `repflow reproduce figure3 --init --model pythia-2.8b`. A run that was stopped goes on.
    """
    from rich.console import Console

    from repflow.monitor.offline.reproduce import run

    console = Console()
    if target[0] in ("draw", "report"):
        for folder in target[1:] or [output]:
            getattr(run, target[0])(Path(folder), console)
        return
    from repflow.monitor.offline.probing import STATES
    from repflow.monitor.offline.reproduce.options import ReproduceOptions

    several: dict[str, list[str] | None] = {"tasks": task, "policies": policy, "schemes": scheme, "lengths": length}
    given: dict[str, Any] = {name: tuple(values) for name, values in several.items() if values}
    options = ReproduceOptions(
        names=tuple(target),
        models=tuple(model or ()),
        revision=revision,
        init=init,
        data=data,
        samples=samples,
        prompt_seed=prompt_seed,
        classes=classes,
        seeds=seeds,
        protocol=protocol,  # pyright: ignore[reportArgumentType]  # checked there
        tokenizer=tokenizer,
        states=states or STATES.get(probes, "residual"),  # pyright: ignore[reportArgumentType]
        cka_estimator=cka,  # pyright: ignore[reportArgumentType]
        probes=probes,  # pyright: ignore[reportArgumentType]
        embeddings=embeddings,  # pyright: ignore[reportArgumentType]
        positions=positions,  # pyright: ignore[reportArgumentType]
        scaled_positions=scaled_positions,
        dtype=dtype,
        device=device,
        device_map=device_map,
        batch_tokens=batch_tokens,
        folder=output,
        force=force,
        pictures=not no_pictures,
        **given,
    )
    run.run(options, console)
