"""Shows a run in Weights & Biases."""

import inspect
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from queue import Empty, SimpleQueue
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from repflow._imports import require
from repflow.monitor.sinks._base import AbstractSink
from repflow.monitor.sinks._keys import StateChoice, scalar_items
from repflow.monitor.sinks._reading import copy_run_file
from repflow.monitor.sinks._wandb_login import has_login
from repflow.monitor.sinks._wandb_run import STEP, define_keys, is_wandb_run, send_alerts, summarised
from repflow.monitor.sinks._worker import Worker
from repflow.monitor.sinks.heatmap import Heatmap, HeatmapSeries
from repflow.monitor.sinks.run_file import RunFileSink
from repflow.monitor.snapshot import RunInfo, Snapshot
from repflow.monitor.warning import warn

if TYPE_CHECKING:
    import wandb

Images = dict[str, Any]
"""What one log call takes of a snapshot's images: key -> `wandb.Image`, and the step that they show."""


class WandbSink(AbstractSink):
    """Logs scalars and heatmaps of every snapshot to W&B, one log call each; also offline.

    Scalars are those of `scalar_items`, over `repflow/step`, the step that was measured: W&B's own step is left to the
    training loop. Heatmaps (`repflow/cka`, `repflow/inter_token`) are encoded in a thread and go out with a later call,
    together with the step they show, `repflow/heatmap_step`. Alerts are sent as W&B's own. At the end the summary gets
    the last values of all states, and the largest of `repflow/alerts/…`, `repflow/nonfinite` and `repflow/zero`.

    Args:
        run: The W&B run; by default the one that is active at `start`, or else a new one, which `close` finishes.
        states: Which states become scalars: "auto", "all" or their numbers.
        heatmaps: Whether to log images.
        max_images: The most images of one run, thinned out as it gets longer.
        run_file: A run file, or the `RunFileSink` that writes it, to be saved as an artifact on `close`.
        also_step: Another key under which to log the measured step, such as that of the training loop's own charts.
        **init_kwargs: For `wandb.init`, if it is called: `project`, `mode`, `dir` and so on. The run is offline for a
            user who is not logged in, unless these or W&B's settings give a mode.

    Raises:
        ModuleNotFoundError: wandb (or Pillow, for heatmaps) is missing.
        TypeError: a run that is none, or `wandb.init` has no such argument.
        ValueError: `max_images` is too small.
    """

    def __init__(
        self,
        run: "wandb.Run | None" = None,
        *,
        states: StateChoice = "auto",
        heatmaps: bool = True,
        max_images: int = 300,
        run_file: str | os.PathLike[str] | RunFileSink | None = None,
        also_step: str | None = None,
        **init_kwargs: Any,
    ) -> None:
        require("wandb")
        _check_arguments(init_kwargs)
        if run is not None and not is_wandb_run(run):
            raise TypeError(
                f"`WandbSink`: expected run as what `wandb.init` returned, got {run!r}; for one of its own write "
                'WandbSink(project="...")'
            )
        if heatmaps:
            require("pillow")
            HeatmapSeries(max_images)  # checks it now rather than when training begins
        self._given = run
        self._states: StateChoice = states
        self._max_images = max_images if heatmaps else 0
        self._run_file = run_file
        self._step_keys = (STEP,) if also_step is None else (STEP, also_step)
        self._init_kwargs = init_kwargs
        self._run: wandb.Run | None = None
        self._own = False
        self._last: Snapshot | None = None
        self._series: HeatmapSeries | None = None
        self._worker: Worker[list[Heatmap]] | None = None
        self._images: SimpleQueue[Images] = SimpleQueue()

    def start(self, run: RunInfo) -> None:
        """Find or open the W&B run, and tell it what is monitored."""
        import wandb

        self.close()
        active = self._given or wandb.run
        self._own = active is None
        if active is None:
            defaults: dict[str, Any] = {"project": "repflow", "name": run.name, **_mode(self._init_kwargs)}
            active = wandb.init(**(defaults | self._init_kwargs))
        self._run = active
        self._run.config.update({"repflow": _described(run)}, allow_val_change=True)
        self._run.define_metric("repflow/*", step_metric=STEP)
        self._last = None
        if self._max_images:
            self._start_heatmaps()

    def _start_heatmaps(self) -> None:
        assert self._run is not None
        self._series = HeatmapSeries(self._max_images)
        self._run.define_metric("repflow/heatmap_step", step_metric="repflow/heatmap_step", hidden=True)
        for name in HeatmapSeries.NAMES:
            self._run.define_metric(f"repflow/{name}", step_metric="repflow/heatmap_step")
        self._images = images = SimpleQueue()
        self._worker = Worker(lambda drawn: _encode(drawn, images), name="images for W&B", capacity=8)

    def write(self, snapshot: Snapshot) -> None:
        """Log the scalars, and the images that are ready.

        Raises:
            RuntimeError: Not started, or already closed, or the W&B run was finished by somebody else.
        """
        from wandb.errors import UsageError

        if self._run is None:
            raise RuntimeError("`WandbSink.write`: expected `start` to come first; call `start(run)`")
        try:
            self._log(self._run, snapshot)
        except UsageError as error:
            self._run = None  # nothing can be logged to it any more, on `close` either
            self._stop_worker()
            raise RuntimeError(
                "`WandbSink.write`: expected the W&B run to be open until monitoring ends, but it cannot be logged to "
                f"({error}); call `wandb.finish()` after that"
            ) from error

    def _log(self, run: "wandb.Run", snapshot: Snapshot) -> None:
        items = scalar_items(snapshot, self._states)
        if self._last is None:
            define_keys(run, items, num_states=len(snapshot.inter_token))
        run.log({**dict.fromkeys(self._step_keys, snapshot.step), **items, **self._ready()})
        send_alerts(run, snapshot.alerts)
        self._last = snapshot
        if self._series is not None and (drawn := self._series.add(snapshot)):
            self._submit(drawn)

    def close(self) -> None:
        """Log what is left, the summary and the artifact; finish the run if this sink opened it.

        All of that is lost, with a warning, if somebody else has finished the run before.
        """
        from wandb.errors import UsageError

        run, self._run = self._run, None
        if run is None:
            return
        try:
            self._log_rest(run)
            if self._run_file is not None:
                save_run_file(run, self._run_file)
        except UsageError as error:
            warn(
                "the last images, the summary and the artifact did not reach W&B: the run cannot be logged to "
                f"({error}); call `wandb.finish()` after monitoring ends"
            )
        finally:
            if self._own:
                run.finish()

    def _log_rest(self, run: "wandb.Run") -> None:
        if self._series is not None and self._worker is not None:
            if drawn := self._series.last():
                self._submit(drawn)
            self._stop_worker()
            while images := self._ready():
                run.log(images)
        if self._last is not None:
            last = {key: value for key, value in scalar_items(self._last, "all").items() if not summarised(key)}
            run.summary.update({STEP: self._last.step, **last})

    def _stop_worker(self) -> None:
        worker, self._worker, self._series = self._worker, None, None
        if worker is not None:
            worker.close()

    def _submit(self, drawn: list[Heatmap]) -> None:
        assert self._worker is not None
        self._worker.submit(drawn)

    def _ready(self) -> Images:
        """The images of the oldest snapshot whose images are encoded, if there is one."""
        try:
            return self._images.get_nowait()
        except Empty:
            return {}


def _encode(drawings: Iterator[list[Heatmap]], images: "SimpleQueue[Images]") -> None:
    """What the thread runs. `wandb.Image` writes the PNG as it is made."""
    import wandb

    for drawn in drawings:
        ready: Images = {"repflow/heatmap_step": drawn[0].step}
        for heatmap in drawn:
            caption = f"step {heatmap.step}: {heatmap.caption}"
            ready[f"repflow/{heatmap.name}"] = wandb.Image(heatmap.rgb(), caption=caption)
        images.put(ready)


def _check_arguments(given: Mapping[str, Any]) -> None:
    """Refuse now what `wandb.init` would refuse when training begins."""
    import wandb

    known = inspect.signature(wandb.init).parameters
    if unknown := sorted(given.keys() - known.keys()):
        raise TypeError(
            f"`WandbSink`: expected arguments of its own or of `wandb.init`, got {', '.join(unknown)}; those of "
            f"`wandb.init` are {', '.join(known)}"
        )


def _mode(given: Mapping[str, Any]) -> dict[str, str]:
    """`mode="offline"` where `wandb.init` would stop and ask for a key, in the middle of a training script.

    W&B's own settings, which it collects from the environment and its files, come after those `given`.
    """
    import wandb

    usual, own = wandb.setup().settings, given.get("settings") or {}
    if not isinstance(own, Mapping):
        own = own.model_dump(include=own.model_fields_set)
    mode, key, token, url = (
        own.get(name) or getattr(usual, name) for name in ("mode", "api_key", "identity_token_file", "base_url")
    )
    chosen = os.environ.get("WANDB_MODE") or mode != "online"
    return {} if chosen or key or token or has_login(url) else {"mode": "offline"}


def _described(run: RunInfo) -> Mapping[str, Any]:
    """What W&B's config says of the run."""
    return asdict(run) | {"blocks": [asdict(block) for block in run.blocks], "num_states": run.num_states}


def save_run_file(run: "wandb.Run", run_file: str | os.PathLike[str] | RunFileSink) -> None:
    """Save a copy of the run file as an artifact: it is still being written if its sink is closed after this one."""
    import wandb

    path = run_file.path if isinstance(run_file, RunFileSink) else Path(run_file)
    if path is None:  # its sink never started
        return
    artifact = wandb.Artifact(f"repflow-{run.id}", type="repflow-run")
    with TemporaryDirectory(prefix="repflow-") as scratch:
        copy = Path(scratch) / path.name
        copy_run_file(path, copy)
        artifact.add_file(str(copy), name=path.name)
    run.log_artifact(artifact)
