"""What checkpoints of the Hugging Face Trainer keep of regularizers, and which of it belongs to one of them."""

from collections.abc import Mapping, Sequence
from typing import Any


def record_of(options: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of the regularizer with these arguments."""
    arguments = {name: options[name] for name in ("target", "layers", "term", "stream", "max_documents")}
    return {"args": {**arguments, "blocks": path_of(options["blocks"])}, "attributes": {"_resumed": dict(state)}}


def path_of(blocks: object) -> str | None:
    """The blocks, if they were given as a path."""
    return blocks if isinstance(blocks, str) else None


def state_in(
    records: dict[str, Any] | list[dict[str, Any]], owner: str, options: Mapping[str, Any], layers: Sequence[int]
) -> dict[str, Any]:
    """The state of the regularizer of this stream and these layers; whatever else has changed. Nothing, of no records.

    Args:
        records: one, or a list.
        owner: for the error.
        options: arguments of the regularizer.
        layers: its layers, counted from 1.

    Raises:
        ValueError: there are records, but of other layers or of another stream.
    """
    every = records if isinstance(records, list) else [records]
    # Each save adds the records of several regularizers to the list: the last ones count. The first have no state yet.
    kept = [(record["args"], record["attributes"]["_resumed"]) for record in reversed(every)]
    kept = [(arguments, state) for arguments, state in kept if state]
    stream = options["stream"]
    fitting = [
        (arguments, state)
        for arguments, state in kept
        if arguments["stream"] == stream and list(state["layers"]) == list(layers)
    ]
    if kept and not fitting:
        found = sorted({f"layers {state['layers']} of stream {arguments['stream']!r}" for arguments, state in kept})
        raise ValueError(
            f"`{owner}`: expected a checkpoint with λ of layers {list(layers)} of stream {stream!r}, got one with that "
            f"of {', '.join(found)}; resume with the layers and the stream that the run began with"
        )
    path = path_of(options["blocks"])
    named = [state for arguments, state in fitting if arguments["blocks"] == path]
    return dict((named or [state for _, state in fitting] or [{}])[0])
