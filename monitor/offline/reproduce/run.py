"""Does what `ReproduceOptions` say: measures, writes data, and draws from what is written."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from repflow._imports import require
from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.memory import out_of_memory_told
from repflow.monitor.offline.processes import Processes, shared_processes
from repflow.monitor.offline.reproduce.checkpoints import measure_depths
from repflow.monitor.offline.reproduce.depth import Depths
from repflow.monitor.offline.reproduce.depth_targets import depth_request, depth_result
from repflow.monitor.offline.reproduce.options import ReproduceOptions
from repflow.monitor.offline.reproduce.random_targets import WITH_CHECKPOINT, random_request, random_result
from repflow.monitor.offline.reproduce.streams import Streams, measure_streams
from repflow.monitor.offline.reproduce.tables import table1, table2
from repflow.monitor.offline.reproduce.targets import Target
from repflow.monitor.offline.reproduce.written import Result, finished, read_result, targets_in, write_result


def run(options: ReproduceOptions, console: Console) -> None:
    """Make every target that is asked for, but for those that are there as asked for.

    Raises:
        OfflineError: what is asked for cannot be done, which is told before anything is measured; or some of it could
            not be, which is told when the rest is done.
        ModuleNotFoundError: an optional package is missing.
    """
    if options.pictures:
        require("matplotlib")  # before hours of measuring, not after them
    for name, reason in options.left_out.items():
        _warn(console, f"{name}: left out: {reason}")
    failures = _Failures()
    with shared_processes() as processes:
        shown = console if not processes.rank else Console(quiet=True)
        missing = [target for target in options.targets if options.force or not _finished(target, options)]
        for target in options.targets:
            if target not in missing:
                shown.print(Text(f"{target.name}: is there already in {options.folder}; --force makes it anew"))
        processes.wait()  # so that nobody sees what another one writes
        _make(options, missing, processes, shown, failures)
        if options.pictures and not processes.rank:
            _draw(options.folder, [target.name for target in options.targets], shown, failures)
    failures.check()


class _Failures:
    """What went wrong, and with which targets: the others are made nevertheless."""

    def __init__(self) -> None:
        self._targets: dict[str, list[str]] = {}

    @contextmanager
    def of(self, *targets: str) -> Iterator[None]:
        """Keep what goes wrong inside."""
        try:
            with out_of_memory_told():
                yield
        except (OfflineError, OSError) as error:
            self._targets.setdefault(str(error), []).extend(targets)

    def check(self) -> None:
        """See that nothing did.

        Raises:
            OfflineError: something did; a line for each reason.
        """
        if self._targets:
            told = [f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in self._targets.items()]
            raise OfflineError("\n".join(told))


def _make(
    options: ReproduceOptions,
    targets: Sequence[Target],
    processes: Processes,
    console: Console,
    failures: _Failures,
) -> None:
    """Measure what targets need, and write each as soon as it can be."""
    random = [target for target in targets if target.random]
    # Two figures of models drawn at random show the checkpoint beside them, where there is one.
    prompted = [target for target in targets if _prompted(target, options)]
    depths = Depths()
    if prompted:
        lengths = dict.fromkeys(length for target in prompted for length in options.lengths_of(target))
        depths = measure_depths(options, tuple(lengths), processes, console)
    if not processes.rank:
        for target in targets:
            if not target.random:
                with failures.of(target.name):
                    depths.check(options.lengths_of(target))
                    _write(_depth_result(target, options, depths, console), options, console)
    if not random:
        return
    streams: Streams | None = None
    # Other processes could not know that this one goes on.
    with failures.of(*(target.name for target in random)) if processes.world == 1 else out_of_memory_told():
        streams = measure_streams(options, random, processes, console)
    if streams is None or processes.rank:
        return
    for target in random:
        with failures.of(target.name):
            if _prompted(target, options):
                depths.check(options.lengths_of(target))
            _write(random_result(target, options, streams, depths), options, console)


def _prompted(target: Target, options: ReproduceOptions) -> bool:
    """Whether a target needs measurements on prompts."""
    return target.depth or (target.name in WITH_CHECKPOINT and not options.init)


def _depth_result(target: Target, options: ReproduceOptions, depths: Depths, console: Console) -> Result:
    if target.probes:
        return table1(target, options, depths, console)
    return table2(target, options, depths) if target.name == "table2" else depth_result(target, options, depths)


def _write(result: Result, options: ReproduceOptions, console: Console) -> None:
    if not result.rows:
        raise OfflineError("nothing could be measured; ask for a smaller --length")
    write_result(options.folder, result)
    console.print(Text(f"{result.target}: {options.folder / result.target}.json"), soft_wrap=True)


def _draw(folder: Path, names: Sequence[str], console: Console, failures: _Failures) -> list[Result]:
    """Draw what is there of `names`: what is returned has its pictures."""
    from repflow.monitor.offline.reproduce.pictures import draw_result

    drawn = []
    for name in names:
        with failures.of(name):
            result = read_result(folder, name)
            if result is not None:
                for path in draw_result(folder, result):
                    console.print(Text(str(path)), soft_wrap=True)
                drawn.append(result)
    return drawn


def draw(folder: Path, console: Console) -> None:
    """Draw the pictures of what is in a folder.

    Raises:
        OfflineError: there is nothing in it; or some of it is damaged, which is told when the rest is drawn.
        ModuleNotFoundError: matplotlib is missing.
    """
    require("matplotlib")
    failures = _Failures()
    _draw(folder, targets_in(folder), console, failures)
    failures.check()


def report(folder: Path, console: Console) -> None:
    """Draw the pictures of what is in a folder, and join all in one page.

    Raises:
        OfflineError: there is nothing in it; or some of it is damaged, which is told when the page of the rest is made.
        ModuleNotFoundError: matplotlib is missing.
    """
    require("matplotlib")
    from repflow.monitor.offline.reproduce.page import write_page

    failures = _Failures()
    drawn = _draw(folder, targets_in(folder), Console(quiet=True), failures)
    if drawn:
        console.print(Text(str(write_page(folder, drawn))), soft_wrap=True)
    failures.check()


def _finished(target: Target, options: ReproduceOptions) -> bool:
    return finished(options.folder, target.name, _request(target, options), options.enough)


def _request(target: Target, options: ReproduceOptions) -> dict[str, Any]:
    return random_request(target, options) if target.random else depth_request(target, options)


def _warn(console: Console, text: str) -> None:
    console.print(Text(text, style="yellow"), soft_wrap=True)
