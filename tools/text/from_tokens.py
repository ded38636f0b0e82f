"""Token ids of an .npy file, as any tokenizer gives them."""

from pathlib import Path

import numpy as np

from ..ending import InputError


def read(path: Path, ids: int) -> np.ndarray:
    """A row of integers below `ids`, not held in memory."""
    try:
        tokens = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        got = f"{tokens.dtype} of shape {tokens.shape}" if isinstance(tokens, np.ndarray) else "several arrays"
        raise InputError(f"{path} must hold a row of integers, got {got}")
    if not len(tokens):
        raise InputError(f"{path} is empty")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= ids:
        raise InputError(f"{path} holds ids {low} to {high}; with vocab_size {ids} they must be below it")
    return tokens
