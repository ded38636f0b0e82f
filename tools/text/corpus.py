"""Texts to train on, in three splits, whatever they are read from."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..ending import InputError
from ..training.checkpoints import sha256
from . import from_bytes, from_csv, from_tokens
from .recipe import TextRecipe

# The enwik8 protocol: the first 90 of 100 MB are for training, the next 5 for validation, the last 5 for the test.
PERCENT = (90, 5, 5)
SPLITS = ("train", "val", "test")
READERS = dict(bytes=(from_bytes.read, "txt"), tokens=(from_tokens.read, "npy"), csv=(from_csv.read, "csv"))


@dataclass(frozen=True)
class Corpus:
    """Each split a 1D array of token ids, or, with `classes`, a list of texts as bytes with their class numbers."""

    train: Sequence
    val: Sequence
    test: Sequence
    classes: list[str]
    name: str
    sha256: str

    @property
    def facts(self) -> dict:
        """What tells this text from another."""
        return dict(sizes=[len(getattr(self, split)) for split in SPLITS], classes=self.classes, sha256=self.sha256)

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, split))} for {split}" for split in SPLITS)
        what = f"{len(self.classes)} classes, texts: " if self.classes else ""
        return f"{self.name}: {what}{sizes}; sha256 {self.sha256}"


def read_corpus(recipe: TextRecipe, path: Path | None) -> Corpus:
    """What the recipe's `source` says: a folder with a file for each split, or one file to be split.

    Raises:
        InputError: that says what is wrong with the path or the text.
    """
    if (path is None) != (recipe.source == "embedded"):
        wanted = "takes no --data" if recipe.source == "embedded" else "needs --data PATH"
        raise InputError(f"source {recipe.source} {wanted}")
    if recipe.source == "embedded":
        text = from_bytes.embedded()
        parts, digest = [np.frombuffer(text, np.uint8)], hashlib.sha256(text).hexdigest()
    else:
        read, ending = READERS[recipe.source]
        files = split_files(path, ending)
        parts = [read(file, recipe.ids) for file in files]
        digests = [sha256(file) for file in files]
        digest = digests[0] if len(files) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    if len(parts) == 1:
        parts = split(parts[0], recipe.seed if recipe.task == "classify" else None)
    need = dict(causal=recipe.context + 1, masked=recipe.context, classify=1)[recipe.task]
    for which, part in zip(SPLITS, parts, strict=True):
        if len(part) < need:
            what = f"{len(part)} tokens for {which}, context {recipe.context} needs {need}"
            what = f"no text for {which}" if recipe.task == "classify" else what
            raise InputError(f"{path or 'the embedded text'} has {what}: give more text or a smaller --context")
    parts, classes = from_csv.numbered(parts, path) if recipe.task == "classify" else (parts, [])
    return Corpus(*parts, classes, str(path or "embedded text"), digest)


def split_files(path: Path, ending: str) -> list[Path]:
    """The files of the three splits in a folder, or the one file that it is."""
    if path.is_dir():
        files = [path / f"{which}.{ending}" for which in SPLITS]
        if missing := [file.name for file in files if not file.is_file()]:
            raise InputError(f"{path} has no {missing[0]}")
    elif path.is_file():
        files = [path]
    else:
        raise InputError(f"there is no file or folder {path}")
    for file in files:
        if not file.stat().st_size:
            raise InputError(f"{file} is empty")
    return files


def split(data: Sequence, seed: int | None = None) -> list[Sequence]:
    """The first 90, the next 5, the last 5 percent, with a seed of the shuffled items of a list."""
    ends = [len(data) * sum(PERCENT[:i]) // 100 for i in range(4)]
    if seed is not None:
        data = [data[i] for i in np.random.default_rng(seed).permutation(len(data))]
    return [data[start:end] for start, end in pairwise(ends)]
