"""An extraction in a process of its own: `python -m tests.monitor.offline.extraction_process MODEL FOLDER SECONDS`.

Each forward takes so many seconds more, so that there is time to kill it.
"""

import sys
import time
from pathlib import Path

from rich.console import Console

from repflow.monitor.offline.extraction import ExtractionOptions, extract
from repflow.monitor.offline.loading import load_model
from repflow.monitor.offline.tasks_kvpr import KeyValueRetrieval
from repflow.monitor.offline.tasks_length import EncodedSamples, PromptEncoder, encode_samples
from tests.monitor.offline import tiny

OPTIONS = ExtractionOptions(batch_tokens=500)


def samples(count: int = 48) -> EncodedSamples:
    return encode_samples(KeyValueRetrieval(items=3), count, PromptEncoder(tiny.tokenizer()), 10**9)


if __name__ == "__main__":
    loaded, seconds = load_model(sys.argv[1]), float(sys.argv[3])
    loaded.model.register_forward_hook(lambda *_: time.sleep(seconds))
    extract(loaded, samples(), Path(sys.argv[2]), OPTIONS, console=Console())
