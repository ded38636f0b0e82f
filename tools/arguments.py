"""Types of command line arguments, for argparse."""

import argparse

import torch
import yaml


def positive(text: str) -> int:
    """A number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of at least 1, got {text!r}")
    return int(text)


def mapping(text: str) -> dict:
    """A mapping in YAML, such as `{cell_size: 2}`."""
    try:
        found = yaml.safe_load(text)
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"must be a mapping, e.g. '{{cell_size: 2}}', got {text!r}")
    return found


def share(text: str) -> float:
    """A number from 0 to 1."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be a number from 0 to 1, got {text!r}")
    return value


def device(text: str) -> str:
    """A device of torch that works here."""
    try:
        torch.zeros(1, device=text).cpu()
    except (AssertionError, RuntimeError, NotImplementedError) as error:
        if text.startswith("cuda") and not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("there is no CUDA device here") from None
        reason = str(error).strip().splitlines()[0]
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used: {reason}") from None
    return text
