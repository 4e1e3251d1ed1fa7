"""What every callback is made with, and the engine that is made from it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.nn import Module

from repflow.monitor import Monitor, MonitorConfig
from repflow.monitor.probe import ProbeBatch
from repflow.monitor.sinks import AbstractSink, RunFileSink
from repflow.monitor.sinks._keys import StateChoice

if TYPE_CHECKING:
    GivenGroup = torch.distributed.ProcessGroup | Callable[[Any], torch.distributed.ProcessGroup | None] | None
else:
    GivenGroup = Any  # there are builds of PyTorch without process groups


@dataclass(frozen=True, kw_only=True, eq=False)
class Choices:
    """The arguments of a callback, checked; see `RepresentationMonitor` for what they mean."""

    config: MonitorConfig
    sinks: Sequence[AbstractSink] | None
    blocks: str | Sequence[Module] | None
    stream: str | None
    name: str | None
    log_states: StateChoice
    probe_batch: ProbeBatch | None
    process_group: GivenGroup
    sequence_group: GivenGroup

    @classmethod
    def checked(
        cls,
        owner: str,
        config: MonitorConfig | None,
        options: Mapping[str, Any],
        *,
        sinks: AbstractSink | Sequence[AbstractSink] | None,
        blocks: str | Sequence[Module] | None,
        stream: str | None,
        name: str | None,
        log_states: StateChoice,
        probe_batch: ProbeBatch | None,
        process_group: GivenGroup,
        sequence_group: GivenGroup,
    ) -> "Choices":
        """The choices, as they are given to the class `owner`.

        Raises:
            TypeError: an option that does not exist, or both a config and options.
            ValueError: an option out of its range.
        """
        if log_states not in ("auto", "all") and (isinstance(log_states, str) or not isinstance(log_states, Sequence)):
            raise ValueError(f'`{owner}`: expected log_states="auto", "all" or state numbers, got {log_states!r}')
        return cls(
            config=MonitorConfig.from_options(config, options),
            sinks=[sinks] if isinstance(sinks, AbstractSink) else sinks,
            blocks=blocks,
            stream=stream,
            name=name,
            log_states=log_states,
            probe_batch=probe_batch,
            process_group=process_group,
            sequence_group=sequence_group,
        )

    def key(self) -> dict[str, str | None]:
        """Tells several monitors of one training apart."""
        blocks = self.blocks if self.blocks is None or isinstance(self.blocks, str) else "given"
        return {"stream": self.stream, "blocks": blocks, "name": self.name}

    def plain(self) -> tuple[dict[str, Any], list[str]]:
        """The arguments that JSON can hold, and the names of those that were given and that it cannot."""
        states = self.log_states if isinstance(self.log_states, str) else list(self.log_states)
        names = ("stream", "name", "blocks", "sinks", "probe_batch", "process_group", "sequence_group")
        given = {name: getattr(self, name) for name in names}
        arguments = {**self.config.to_dict(), "signatures": self.config.signatures, "log_states": states, **given}
        plain = {name: value for name, value in arguments.items() if _is_plain(value)}
        return plain, sorted(arguments.keys() - plain.keys())

    def own_sinks(self) -> Sequence[AbstractSink]:
        """The given sinks, or else a run file."""
        return [RunFileSink()] if self.sinks is None else self.sinks

    def check(self, model: Module, *, trainer: object, compiled: bool) -> None:
        """Make the engine on a rank that measures nothing, and close it.

        An error must come on all ranks, or the others would wait for the first for ever; and a function that makes a
        group waits for all ranks.
        """
        self.monitor(model, (), trainer=trainer, compiled=compiled).close()

    def monitor(
        self,
        model: Module,
        sinks: Sequence[AbstractSink],
        *,
        trainer: object,
        compiled: bool,
        name: str | None = None,
    ) -> Monitor:
        """The engine of one training.

        Args:
            model: what is trained.
            trainer: what functions that give groups are called with.
            sinks: all of them.
            compiled: whether the framework compiles the model around what it shows of it.
            name: of the run, in place of the one that was chosen.
        """
        config = replace(self.config, compiled=True) if compiled and self.config.compiled == "auto" else self.config
        return Monitor(
            model,
            config,
            sinks=sinks,
            blocks=self.blocks,
            stream=self.stream,
            name=self.name if name is None else name,
            probe_batch=self.probe_batch,
            process_group=_found(self.process_group, trainer),
            sequence_group=_found(self.sequence_group, trainer),
        )


def _found(given: GivenGroup, trainer: object) -> "torch.distributed.ProcessGroup | None":
    """The group that was given, or is given now that groups can be there; None where no process has one."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    return given(trainer) if callable(given) else given


def run_file_of(sinks: Sequence[AbstractSink]) -> RunFileSink | None:
    """The sink that writes the run file, of which loggers may keep a copy."""
    return next((sink for sink in sinks if isinstance(sink, RunFileSink)), None)


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)
