"""Does what `ReproduceOptions` say: measures, writes data, and draws from what is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from repflow._imports import require
from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.memory import out_of_memory_told
from repflow.monitor.offline.processes import Processes, shared_processes
from repflow.monitor.offline.reproduce.checkpoints import Depths, measure_depths
from repflow.monitor.offline.reproduce.depth_targets import depth_request, depth_result
from repflow.monitor.offline.reproduce.options import ReproduceOptions
from repflow.monitor.offline.reproduce.random_targets import random_request, random_result
from repflow.monitor.offline.reproduce.streams import measure_streams
from repflow.monitor.offline.reproduce.tables import table1, table2
from repflow.monitor.offline.reproduce.targets import Target
from repflow.monitor.offline.reproduce.written import finished, read_result, results_in, write_result


def run(options: ReproduceOptions, console: Console) -> None:
    """Make every target that is asked for, but for those that are there as asked for.

    Raises:
        OfflineError: something that was asked for cannot be done; what was measured before is kept.
        ModuleNotFoundError: an optional package is missing.
    """
    if options.pictures:
        require("matplotlib")  # before hours of measuring, not after them
    for name, reason in options.left_out.items():
        _warn(console, f"{name}: left out: {reason}")
    with shared_processes() as processes:
        shown = console if not processes.rank else Console(quiet=True)
        missing = [target for target in options.targets if options.force or not _finished(target, options)]
        for target in options.targets:
            if target not in missing:
                shown.print(Text(f"{target.name}: is there already in {options.folder}; --force makes it anew"))
        processes.wait()  # so that nobody sees what another one writes
        with out_of_memory_told():
            _make(options, missing, processes, shown)
        if options.pictures and not processes.rank:
            _draw(options.folder, [target.name for target in options.targets], shown)


def _make(options: ReproduceOptions, targets: Sequence[Target], processes: Processes, console: Console) -> None:
    """Measure what targets need, and write each as soon as it can be."""
    random, depth = ([target for target in targets if getattr(target, kind)] for kind in ("random", "depth"))
    depths = Depths()
    # The figures of models drawn at random show the checkpoint beside them, where there is one.
    needing = depth + ([] if options.init else random)
    if needing:
        lengths = dict.fromkeys(length for target in needing for length in options.lengths_of(target))
        depths = measure_depths(options, tuple(lengths), processes, console)
    streams = measure_streams(options, random, processes, console) if random else None
    if processes.rank:
        return
    for target in targets:
        if target.random:
            assert streams is not None
            result = random_result(target, options, streams, depths)
        elif target.probes:
            result = table1(target, options, depths, console)
        elif target.name == "table2":
            result = table2(target, options, depths)
        else:
            result = depth_result(target, options, depths)
        if not result.rows:
            raise OfflineError(f"{target.name}: nothing could be measured; ask for a smaller --length")
        write_result(options.folder, result)
        console.print(Text(f"{target.name}: {options.folder / target.name}.json"), soft_wrap=True)


def _draw(folder: Path, names: Sequence[str], console: Console) -> None:
    from repflow.monitor.offline.reproduce.pictures import draw_result

    for name in names:
        result = read_result(folder, name)
        if result is not None:
            for path in draw_result(folder, result):
                console.print(Text(str(path)), soft_wrap=True)


def draw(folder: Path, console: Console) -> None:
    """Draw the pictures of what is in a folder.

    Raises:
        OfflineError: there is nothing in it, or something damaged.
        ModuleNotFoundError: matplotlib is missing.
    """
    require("matplotlib")
    from repflow.monitor.offline.reproduce.pictures import draw_result

    for result in results_in(folder):
        for path in draw_result(folder, result):
            console.print(Text(str(path)), soft_wrap=True)


def report(folder: Path, console: Console) -> None:
    """Draw the pictures of what is in a folder, and join all in one page.

    Raises:
        OfflineError: there is nothing in it, or something damaged.
        ModuleNotFoundError: matplotlib is missing.
    """
    require("matplotlib")
    from repflow.monitor.offline.reproduce.page import write_page

    console.print(Text(str(write_page(folder))), soft_wrap=True)


def _finished(target: Target, options: ReproduceOptions) -> bool:
    return finished(options.folder, target.name, _request(target, options))


def _request(target: Target, options: ReproduceOptions) -> dict[str, Any]:
    return random_request(target, options) if target.random else depth_request(target, options)


def _warn(console: Console, text: str) -> None:
    console.print(Text(text, style="yellow"), soft_wrap=True)
