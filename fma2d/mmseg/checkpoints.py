"""Files of weights as mmengine has them, read without running code in them, and safetensors beside them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from textwrap import shorten

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.registry import HOOKS
from mmengine.runner import Runner
from mmengine.runner import checkpoint as runner_checkpoint
from mmengine.runner.checkpoint import CheckpointLoader
from safetensors import safe_open
from torch import Tensor

from ..checkpoint import describe


class CheckpointError(RuntimeError, ValueError):
    """A file of weights that is not there, cannot be read or does not fit the model; its text says why, in one line."""


@contextmanager
def fitting(filename: str) -> Iterator[None]:
    """Turn what the loading of weights from a file raises into a `CheckpointError`."""
    try:
        yield
    except RuntimeError as error:
        raise CheckpointError(f"{filename} does not fit: {one_line(error)}") from None


@CheckpointLoader.register_scheme(prefixes=r".*\.safetensors$")
def load_from_safetensors(filename: str, map_location: str | None = None) -> dict:
    """A safetensors file as mmengine's checkpoints are: `state_dict`, and its metadata as `meta`."""
    with safe_open(filename, "pt", device=str(map_location or "cpu")) as file:
        names = file.keys()  # the file itself cannot be iterated over
        return dict(state_dict={name: file.get_tensor(name) for name in names}, meta=file.metadata() or {})


def load_tensors(filename: str, map_location: str):
    """A file of torch.save under `weights_only=True`, where mmengine would run its code; a log's history is allowed."""
    allowed = [*getattr(runner_checkpoint, "get_torch_safe_globals", list)(), HistoryBuffer]
    safe_globals = getattr(torch.serialization, "safe_globals", lambda _: nullcontext())  # from torch 2.5 on
    with safe_globals(allowed):
        return torch.load(filename, map_location=map_location, weights_only=True)


def read_weights(filename: str, map_location: str = "cpu") -> dict[str, Tensor]:
    """The state dict in a file, out of what it may be wrapped in; weights averaged beside it (EMA) are not taken.

    Raises:
        CheckpointError: if the file is not there or none of weights.
    """
    is_pickle = Path(filename).is_file() and not filename.endswith(".safetensors")
    try:
        checkpoint = (load_tensors if is_pickle else CheckpointLoader.load_checkpoint)(filename, map_location)
    except FileNotFoundError:
        raise CheckpointError(f"there is no file {filename} to take weights from") from None
    except UnpicklingError:
        raise CheckpointError(
            f"{filename} is not a checkpoint of tensors and plain values; what else a file holds could run code, so it "
            "is not loaded"
        ) from None
    except Exception as error:  # whatever unpickling a foreign file raises
        raise CheckpointError(f"{filename} is not a checkpoint: {one_line(error)}") from None
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{filename} holds no state dict but a {type(checkpoint).__name__}")
    for wrapper in ("state_dict", "model"):
        if isinstance(checkpoint.get(wrapper), dict):
            checkpoint = checkpoint[wrapper]
    plain = ((name.replace("_orig_mod.", "").removeprefix("module."), weight) for name, weight in checkpoint.items())
    return dict(plain)


def one_line(error: Exception) -> str:
    """What an exception says, or its name if it says nothing; torch may name each weight on a line of its own."""
    return shorten(str(error) or type(error).__name__, 600)


@HOOKS.register_module()
class PlainCheckpoints(Hook):
    """Has mmengine write checkpoints that load under `weights_only=True` and tell the model's settings.

    numpy's values become Python's own types and the log's history tensors; resuming with this hook restores the
    history, without it the history is dropped. `meta["fma2d"]` holds what the metadata of `save_checkpoint` does.
    """

    priority = "LOWEST"  # comes after the hooks that add something

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        checkpoint["meta"]["fma2d"] = describe(runner.model)
        for name in checkpoint:
            if not name.endswith("state_dict"):  # tensors already, and torch's notes with them
                checkpoint[name] = plain(checkpoint[name])

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if isinstance(hub := checkpoint.get("message_hub"), dict):
            for name, value in hub["log_scalars"].items():
                if isinstance(value, dict):
                    hub["log_scalars"][name] = HistoryBuffer(*(value[part].cpu().numpy() for part in ("log", "count")))


def plain(value):
    """What `weights_only=True` loads, in place of mmengine's and numpy's types."""
    if isinstance(value, HistoryBuffer):
        log, count = value.data
        return dict(log=torch.from_numpy(log), count=torch.from_numpy(count))
    if isinstance(value, np.ndarray | np.generic):
        return value.tolist()
    if isinstance(value, Mapping):
        return {name: plain(part) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(plain, value))
    return value
