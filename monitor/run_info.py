"""What a run says about itself: model, blocks, configuration and versions."""

import platform
import sys
import uuid
from datetime import datetime

from torch.nn import Module
from torch.nn.parameter import UninitializedParameter

import repflow
from repflow.monitor.config import MonitorConfig
from repflow.monitor.masks import MaskReader
from repflow.monitor.residual_stream import ResidualStream
from repflow.monitor.snapshot import BlockInfo, RunInfo
from repflow.monitor.ssm import ssm_blocks


def describe_run(
    model: Module, stream: ResidualStream, config: MonitorConfig, name: str | None, *, probe: bool = False
) -> RunInfo:
    """The metadata of a run of `model`; without a `name`, one that no other run has. `probe`: of a probe batch.

    The model's class is that of the outermost module that takes an attention mask: what wraps it says little.
    """
    inner = next((module for module in stream.ancestors if MaskReader(module).takes_mask()), model)
    model_class = type(inner).__name__
    packages = ("torch", "transformers", "lightning", "pytorch_lightning", "wandb")
    loaded = {name: getattr(sys.modules[name], "__version__", "unknown") for name in packages if name in sys.modules}
    return RunInfo(
        name=name or f"{model_class}-{datetime.now():%Y%m%d-%H%M%S}-{uuid.uuid4().hex[:4]}",
        stream=stream.name,
        blocks=tuple(BlockInfo(index=block.index, name=block.name, kind=block.kind) for block in stream.blocks),
        model_class=model_class,
        parameters=sum(p.numel() for p in model.parameters() if not isinstance(p, UninitializedParameter)),
        config=config.to_dict(),
        ssm_blocks=ssm_blocks(stream) if "ssm" in config.metrics else (),
        probe=probe,
        versions={"repflow": repflow.__version__, "python": platform.python_version(), **loaded},
    )
