"""Bytes of a file as ids."""

import os
import sysconfig
from pathlib import Path

import numpy as np

from ..ending import InputError

# Parts of a Python installation that are not its own, differ from machine to machine, or are missing on many.
NOT_EMBEDDED = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3")


def read(path: Path, ids: int) -> np.ndarray:
    """The bytes of a file, not held in memory; there are 256 `ids`."""
    return np.memmap(path, np.uint8, "r")


def embedded() -> bytes:
    """The .py files of this Python's standard library in the order of their names, without tests and generated ones."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_EMBEDDED]
        files = [name for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")]
        found += [(Path(folder).relative_to(root) / name).as_posix() for name in files]
    if not found:
        raise InputError(f"this Python has no sources in {root}; train on a file of your own: --source bytes")
    return b"".join((root / name).read_bytes() for name in sorted(found))
