"""Models and tokenizers: from the Hugging Face hub by name, from a folder, or a model from its configuration alone."""

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.nn import Module

from repflow._imports import require
from repflow.monitor.offline import OfflineError
from repflow.monitor.offline.paper_models import PAPER_MODELS
from repflow.monitor.offline.processes import local_device

_PROBED = 64  # values of each parameter that enter the fingerprint
_Found = TypeVar("_Found")


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model in evaluation mode, without its head."""

    name: str
    """As it was asked for."""
    model: Module
    config: Any
    """Of transformers."""
    device: torch.device
    """Where its input goes."""
    weights: str
    """`pretrained`, or `random` where they were drawn from the configuration."""
    revision: str | None = None
    """The commit on the hub; None for what is not from there."""

    @property
    def window(self) -> int | None:
        """Most tokens that the model was made for; None if there is no such number, as for state-space models."""
        return window_of(self.config)

    @property
    def vocabulary(self) -> int:
        """Tokens that the model knows."""
        return int(self.config.get_text_config().vocab_size)

    def fingerprint(self) -> str:
        """A hash of names, shapes, dtypes and some values of all parameters: training changes it, loading does not."""
        digest = hashlib.blake2b(digest_size=16)
        for name, parameter in self.model.named_parameters():
            digest.update(f"{name} {list(parameter.shape)} {parameter.dtype}".encode())
            if parameter.device.type != "meta":  # kept elsewhere until it is needed
                flat = parameter.detach().flatten()
                some = flat[:: max(1, len(flat) // _PROBED)][:_PROBED]
                digest.update(some.double().cpu().numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What was loaded, as plain values."""
        return {
            "model": self.name,
            "model_class": type(self.model).__name__,
            "revision": self.revision,
            "weights": self.weights,
            "dtypes": sorted({str(parameter.dtype).removeprefix("torch.") for parameter in self.model.parameters()}),
            "device": self.device.type,
            "window": self.window,
        }


def load_model(
    name: str,
    *,
    init: bool = False,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
) -> LoadedModel:
    """The model that `name` stands for, without its head, in evaluation mode.

    Args:
        name: `owner/name` on the hub, or a name alone that it knows, such as `gpt2`; a folder with a checkpoint; or one
            of `PAPER_MODELS`; with `init` also a JSON file with a configuration.
        init: take the configuration alone, and the weights that transformers draws for it.
        seed: of these weights.
        dtype: of the weights; that of the checkpoint if None, and float32 with `init`.
        device: where to; if None the GPU of this process, where there is one.
        device_map: spread the model over several devices instead, as accelerate does: `"auto"`, or a device for each
            part.
        revision: of a model on the hub.

    Raises:
        OfflineError: there is no such model, or its checkpoint is incomplete.
        ModuleNotFoundError: transformers is missing, or accelerate for `device_map`.
    """
    if device_map is not None:
        require("accelerate")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise OfflineError(
                "--device-map: expected one process, which takes all devices; start it without torchrun, or leave "
                "--device-map out where the model fits on one device"
            )
        if init or device is not None:
            raise OfflineError(
                "--device-map: expected a checkpoint to spread over devices, without --init and --device"
            )
    where = local_device() if device is None else torch.device(device)
    commit = commit_of(name, revision, init=init)
    revision = commit or revision  # all files of one commit, wherever a branch moves meanwhile
    if init:
        model = _drawn(name, load_config(name, revision), seed, dtype or torch.float32, where)
    else:
        model = _pretrained(name, revision, dtype or "auto", device_map)
    if device_map is None:
        model = model.to(where)
    else:
        where = _input_device(model)
    return LoadedModel(name, model.eval(), model.config, where, "random" if init else "pretrained", commit)


def commit_of(name: str, revision: str | None = None, *, init: bool = False, file: str = "config.json") -> str | None:
    """The commit on the hub that `name` stands for now: what tells a branch that moved from what it was.

    `file` is one that must be there. Without a network it is that of the cache. None for a folder, for what is not to
    be had, and with `init` for one of `PAPER_MODELS`, whose configuration is here.
    """
    require("transformers")
    from transformers.utils.hub import cached_file, extract_commit_hash

    if Path(name).exists() or (init and name.lower() in PAPER_MODELS):
        return None
    try:
        with _quiet():
            return extract_commit_hash(cached_file(hub_name(name), file, revision=revision), None)
    except Exception:  # of a dozen kinds; what loads the model says what is wrong with its name
        return None


def load_config(name: str, revision: str | None = None) -> Any:
    """The configuration of what `name` stands for; see `load_model`.

    Raises:
        OfflineError: there is none.
    """
    require("transformers")
    import transformers

    if paper := PAPER_MODELS.get(name.lower()):
        return transformers.CONFIG_MAPPING[paper.model_type](**paper.sizes)
    _check_place(name)
    return _attempt(name, lambda: transformers.AutoConfig.from_pretrained(name, revision=revision))


def load_tokenizer(name: str, revision: str | None = None) -> Any:
    """The tokenizer of what `name` stands for; see `load_model`.

    Raises:
        OfflineError: there is none.
    """
    require("transformers")
    import transformers

    _check_place(name)
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(hub_name(name), revision=revision)
        if len(tokenizer) <= len(tokenizer.all_special_ids):  # what transformers makes where there are no files
            raise ValueError("it has no tokens")
    except Exception as error:
        raise OfflineError(
            f"{name}: expected a tokenizer beside the model, found none that loads ({_line(error)}); name another: "
            "--tokenizer NAME_OR_PATH"
        ) from error
    return tokenizer


def check_weights(name: str) -> None:
    """See that a folder, if `name` is one, has weights in it.

    Raises:
        OfflineError: it has none.
    """
    if Path(name).is_dir() and not any(Path(name).glob("*.safetensors")) and not any(Path(name).glob("*.bin")):
        raise OfflineError(
            f"{name}: expected a checkpoint, found no weights (*.safetensors, *.bin); --init draws them from the "
            "configuration"
        )


def window_of(config: Any) -> int | None:
    """Most tokens that a model of this configuration was made for; None if it names no such number."""
    window = getattr(config.get_text_config(), "max_position_embeddings", None)
    return window if isinstance(window, int) and window > 0 else None


def scan_of(model: Module) -> str | None:
    """What runs the scans of a model's state spaces: `mamba_ssm`, which transformers calls where it is installed.

    Or `transformers`, whose own code is much slower: Mamba's loops over tokens. None for a model that scans nothing.
    """
    if not any(hasattr(module, "A_log") for module in model.modules()):
        return None
    return "mamba_ssm" if importlib.util.find_spec("mamba_ssm") is not None else "transformers"


def _pretrained(name: str, revision: str | None, dtype: Any, device_map: Any) -> Any:
    import transformers

    _check_place(name)
    check_weights(name)
    options = {"dtype": dtype, "device_map": device_map, "revision": revision, "output_loading_info": True}
    model, found = _attempt(name, lambda: transformers.AutoModel.from_pretrained(hub_name(name), **options))
    if missing := sorted(found["missing_keys"]):
        raise OfflineError(
            f"{name}: expected a whole checkpoint of {type(model).__name__}, found none of {len(missing)} parameters, "
            f"such as {missing[0]}: transformers would draw them at random"
        )
    return model


def _drawn(name: str, config: Any, seed: int, dtype: torch.dtype, device: torch.device) -> Any:
    import transformers

    with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(seed)
        return _attempt(name, lambda: transformers.AutoModel.from_config(config, dtype=dtype))


def _input_device(model: Any) -> torch.device:
    """Where a model that is spread over devices takes its input: the first of them that computes."""
    places = [place for place in getattr(model, "hf_device_map", {}).values() if place != "disk"]
    return torch.device(next((place for place in places if place != "cpu"), "cpu"))


def hub_name(name: str) -> str:
    """The name on the hub: of the paper's models the configuration is here, the weights are there."""
    paper = PAPER_MODELS.get(name.lower())
    return paper.hub if paper else name


def _check_place(name: str) -> None:
    """Raise an OfflineError where a folder that was meant holds no model."""
    path = Path(name)
    if path.is_dir() and not (path / "config.json").is_file():
        raise OfflineError(f"{name}: expected a folder with a model, found no config.json in it")
    if path.is_file() and not _is_config(path):
        raise OfflineError(f"{name}: expected a folder with a model, or a JSON file with a configuration")
    is_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1
    if not path.exists() and is_path:
        raise OfflineError(f"{_expected(name)}; found nothing there")


def _expected(name: str) -> str:
    return (
        f"{name}: expected a folder with a model, owner/name on the Hugging Face hub or a name alone that it knows, "
        f"such as gpt2, or one of {', '.join(PAPER_MODELS)}"
    )


def _is_config(path: Path) -> bool:
    try:
        return "model_type" in json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, TypeError, OSError):
        return False


def _attempt(name: str, call: Callable[[], _Found]) -> _Found:
    """What `call` returns, without what transformers has to say; what it raises becomes one line."""
    try:
        with _quiet():
            return call()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        cause = f"could not be loaded: {type(error).__name__}: {_line(error)}"
        misspelt = "/" not in name and not Path(name).exists() and name.lower() not in PAPER_MODELS
        raise OfflineError(f"{_expected(name)}; it {cause}" if misspelt else f"{name}: {cause}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    import transformers

    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
