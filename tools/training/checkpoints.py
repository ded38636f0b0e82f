"""Files of a run: weights for use, and the state from which it goes on; each is written whole or not at all."""

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from timm.models import load_state_dict
from torch import Tensor, nn

from fma2d.backbone import FMA2DBackbone
from fma2d.checkpoint import UNFINISHED, check_state_dict, save_checkpoint, write_whole

from ..ending import InputError

STATE_FORMAT = 1


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what goes wrong while a file is written, whole or not at all, into an `InputError`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
        raise InputError(f"cannot write {path}, what was there is kept: {' '.join(str(error).split())}") from None


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with writing(path):
        write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def remove_unfinished(folder: Path) -> None:
    """Remove what a run killed while writing has left."""
    for path in folder.glob(f".*{UNFINISHED}"):
        path.unlink()


def sha256(path: Path) -> str:
    """The hash of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def save_weights(model: nn.Module, path: Path, metadata: dict) -> None:
    """Weights as safetensors with their metadata, by `fma2d.checkpoint.save_checkpoint`."""
    with writing(path):
        save_checkpoint(model, path, **metadata)


def read_metadata(path: Path) -> dict:
    """The metadata of a safetensors file, JSON decoded; {} for other files."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    return {key: _decoded(value) for key, value in metadata.items()}


def _decoded(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The state dict in a checkpoint of any kind that timm reads.

    Raises:
        InputError: if it is none, or holds more than tensors and plain values.
    """
    try:
        return load_state_dict(str(path))
    except Exception:  # whatever unpickling a foreign file raises; what it advises would run code that a file holds
        raise InputError(f"{path} is not a checkpoint of tensors and plain values") from None


def load_weights(
    model: nn.Module, path: Path, name: str, new_head: bool = False, say: Callable[[str], object] = print
) -> None:
    """Load a checkpoint, of any kind that timm reads, and `say` what an fma2d model does not report by itself.

    Aggregation kernels fit by themselves (`fma2d.checkpoint`); all else must be there in the model's shape, the
    classifier excepted if it is to stay new.

    Raises:
        InputError: that names what does not fit.
    """
    if not path.is_file():
        raise InputError(f"there is no checkpoint {path}")
    metadata = read_metadata(path)
    architecture = metadata.get("architecture", name)
    if architecture != name:
        raise InputError(f"{path} holds {architecture}, not {name}")
    stored = read_tensors(path)
    own, classifier = model.state_dict(), model.pretrained_cfg["classifier"]
    head, weight = {key for key in own if key.startswith(f"{classifier}.")}, f"{classifier}.weight"
    if new_head:
        stored = {key: value for key, value in stored.items() if key not in head} | {key: own[key] for key in head}
    elif weight in stored and len(stored[weight]) != len(own[weight]):
        raise InputError(
            f"{path} has {len(stored[weight])} classes, not {model.num_classes}; "
            "a training starts a new classifier with init_head: new"
        )
    elif head and head == {key for key in own if not key.endswith(".kernels")} - stored.keys():
        raise InputError(f"{path} has no classifier; a training starts a new one with init_head: new")
    reports = isinstance(model, FMA2DBackbone)
    try:
        if not reports:
            check_state_dict(model, stored)
        model.load_state_dict(stored)
    except RuntimeError as error:
        raise InputError(f"{path} does not fit {name}: {' '.join(str(error).split())}") from None
    said = [] if reports else [f"{len(own) - len(head) * new_head} matched"]
    if said := said + ["a new classifier"] * new_head:
        say(f"weights of {path}: {', '.join(said)}")


def save_state(path: Path, state: dict) -> None:
    """All that a run needs to go on, as one file that loads under `weights_only=True`."""
    with writing(path):
        write_whole(path, lambda temporary: torch.save({"format": STATE_FORMAT, **state}, temporary))


def load_state(path: Path) -> dict:
    """What `save_state` wrote, on the CPU."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception:  # whatever unpickling a foreign file raises; what it advises would run code that a file holds
        raise InputError(f"{path} is not a training state, or damaged") from None
    if not isinstance(state, dict) or state.get("format") != STATE_FORMAT:
        raise InputError(f"{path} is not a training state of this version")
    return state
