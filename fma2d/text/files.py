"""One file for a model: its weights, and in the metadata all that it is made of."""

import json
import os

import torch
from safetensors import SafetensorError, safe_open

from ..checkpoint import save_checkpoint
from .model import CausalLM, MaskedLM, SequenceClassifier, TextModel

CLASSES = {cls.__name__: cls for cls in (CausalLM, MaskedLM, SequenceClassifier)}


def save_model(path: str | os.PathLike, model: TextModel, **note) -> str:
    """Write a model to a file that ends in `.safetensors`, whole or not at all; gives its sha256.

    `note` is what else a reader should know, as JSON can hold it, such as `tokens="bytes"`: what the ids stand for.

    Raises:
        TypeError, ValueError: for what is not one of the text models, or another suffix.
    """
    if CLASSES.get(type(model).__name__) is not type(model):
        raise TypeError(f"model must be one of {', '.join(CLASSES)}, got {type(model).__name__}")
    return save_checkpoint(model, path, architecture=type(model).__name__, options=model.options, note=note)


def load_model(path: str | os.PathLike, device: torch.device | str = "cpu") -> TextModel:
    """The model of a file that `save_model` wrote, for inference (`eval`); its `note` is what was given then.

    Raises:
        FileNotFoundError: where there is no file.
        ValueError: for a file that `save_model` did not write, or not with this version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    name = metadata.get("architecture")
    if name not in CLASSES or not {"options", "note"} <= metadata.keys():
        raise ValueError(f"{path} is not a text model: fma2d.text.save_model did not write it")
    try:
        model = CLASSES[name](**json.loads(metadata["options"]))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: this version of fma2d has no such {name}: {error}") from error
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(f"{path} lacks weights of its {name}: {' '.join(str(error).split())}") from None
    model.note = json.loads(metadata["note"])
    return model.eval().to(device)
