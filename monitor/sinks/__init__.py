"""Where snapshots go: a run file, W&B, any Lightning logger, several of them, or nowhere."""

from repflow.monitor.sinks._base import AbstractSink
from repflow.monitor.sinks._schema import RunFileError
from repflow.monitor.sinks.fan_out import FanOutSink
from repflow.monitor.sinks.logger_sink import LoggerSink
from repflow.monitor.sinks.null import NullSink
from repflow.monitor.sinks.open_run import open_run
from repflow.monitor.sinks.run_file import RunFileSink
from repflow.monitor.sinks.wandb_sink import WandbSink

__all__ = [
    "AbstractSink",
    "FanOutSink",
    "LoggerSink",
    "NullSink",
    "RunFileError",
    "RunFileSink",
    "WandbSink",
    "open_run",
]
