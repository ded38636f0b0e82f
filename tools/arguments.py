"""Types of command line arguments, for argparse."""

import argparse

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
