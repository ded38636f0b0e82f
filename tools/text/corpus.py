"""Texts to train on: the embedded text, byte files, token files, CSV files of labelled texts; each in three splits."""

import csv
import hashlib
import os
import sys
import sysconfig
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from ..ending import InputError
from .recipe import TextRecipe

# The enwik8 protocol: the first 90 of 100 MB are for training, the next 5 for validation, the last 5 for the test.
PERCENT = (90, 5, 5)
SPLITS = ("train", "val", "test")
# Parts of a Python installation that are not its own, differ from machine to machine, or are missing on many.
NOT_EMBEDDED = ("site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "lib2to3")
GENERATED = "_sysconfigdata"


@dataclass(frozen=True)
class Corpus:
    """Token ids of the three splits, each a 1D array of unsigned integers; `sha256` of all."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    name: str
    sha256: str

    @property
    def facts(self) -> dict:
        """What tells this text from another."""
        return dict(tokens=sum(map(len, (self.train, self.val, self.test))), sha256=self.sha256)

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, split))} for {split}" for split in SPLITS)
        return f"{self.name}: {sizes}; sha256 {self.sha256}"


@dataclass(frozen=True)
class Labelled:
    """Texts as bytes with labels, and the class names in the order of the labels."""

    train: list[tuple[bytes, int]]
    val: list[tuple[bytes, int]]
    test: list[tuple[bytes, int]]
    classes: list[str]
    name: str
    sha256: str

    @property
    def facts(self) -> dict:
        return dict(classes=self.classes, texts=sum(map(len, (self.train, self.val, self.test))), sha256=self.sha256)

    def __str__(self) -> str:
        sizes = ", ".join(f"{len(getattr(self, split))} for {split}" for split in SPLITS)
        return f"{self.name}: {len(self.classes)} classes, texts: {sizes}; sha256 {self.sha256}"


def read_corpus(recipe: TextRecipe, path: Path | None) -> Corpus | Labelled:
    """What the recipe's `source` says, from `path`.

    Raises:
        InputError: that says what is wrong with the path or the text.
    """
    if (path is None) != (recipe.source == "embedded"):
        wanted = "takes no --data" if recipe.source == "embedded" else "needs --data PATH"
        raise InputError(f"source {recipe.source} {wanted}")
    if path is not None and not path.exists():
        raise InputError(f"there is no file or folder {path}")
    if recipe.source == "csv":
        return read_csv(path, recipe.seed)
    if recipe.source == "embedded":
        text = embedded_text()
        name = f"embedded text (the sources and documentation of Python {sys.version.split()[0]}), bytes"
        splits, digest = split(np.frombuffer(text, np.uint8)), hashlib.sha256(text).hexdigest()
    elif recipe.source == "bytes":
        data = read_bytes(path)
        name, splits, digest = f"{path}, bytes", split(data), hashlib.sha256(data).hexdigest()
    else:
        name, (splits, digest) = f"{path}, tokens", read_tokens(path, recipe)
    need = recipe.context + 1 if recipe.task == "causal" else recipe.context
    for which, part in zip(SPLITS, splits, strict=True):
        if len(part) < need:
            raise InputError(
                f"{path or 'the embedded text'} has {len(part)} tokens for {which}, context {recipe.context} needs "
                f"{need}: give more text or a smaller --context"
            )
    return Corpus(*splits, name, digest)


def embedded_files() -> list[str]:
    """The standard library's .py files, sorted, relative to its folder; its tests and generated files left out."""
    root, found = Path(sysconfig.get_path("stdlib")), []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in NOT_EMBEDDED]
        files = [name for name in files if name.endswith(".py") and not name.startswith(GENERATED)]
        found += [(Path(folder).relative_to(root) / name).as_posix() for name in files]
    return sorted(found)


def embedded_text() -> bytes:
    """The text found inside this Python installation, its own sources and documentation: 12 MB with Python 3.11."""
    root = Path(sysconfig.get_path("stdlib"))
    text = b"".join((root / name).read_bytes() for name in embedded_files())
    if not text:
        raise InputError(f"this Python has no sources in {root}; train on a file of your own: --source bytes")
    return text


def split(data: np.ndarray) -> list[np.ndarray]:
    """The first 90, the next 5, the last 5 percent."""
    ends = [len(data) * sum(PERCENT[:i]) // 100 for i in range(4)]
    return [data[start:end] for start, end in pairwise(ends)]


def read_bytes(path: Path) -> np.ndarray:
    """The bytes of a file, not held in memory."""
    if not path.is_file():
        raise InputError(f"{path} is not a file; source bytes is one file")
    if not path.stat().st_size:
        raise InputError(f"{path} is empty")
    return np.memmap(path, np.uint8, "r")


def read_tokens(path: Path, recipe: TextRecipe) -> tuple[list[np.ndarray], str]:
    """The three splits and their hash: of a folder with train, val and test, each .npy or .bin, or of one such file."""
    parts = (
        [_tokens(_split_file(path, which), recipe) for which in SPLITS] if path.is_dir() else [_tokens(path, recipe)]
    )
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part))
    return (parts if len(parts) > 1 else split(parts[0])), digest.hexdigest()


def _split_file(folder: Path, which: str) -> Path:
    for ending in (".npy", ".bin"):
        if (folder / (which + ending)).is_file():
            return folder / (which + ending)
    raise InputError(f"{folder} has neither {which}.npy nor {which}.bin")


def _tokens(path: Path, recipe: TextRecipe) -> np.ndarray:
    if path.suffix not in (".npy", ".bin"):
        raise InputError(f"{path} must be a .npy file, or a .bin file of {recipe.token_dtype}")
    try:
        if path.suffix == ".npy":
            tokens = np.load(path, mmap_mode="r")
        elif path.stat().st_size % np.dtype(recipe.token_dtype).itemsize:
            raise InputError(f"{path} does not hold whole numbers of {recipe.token_dtype}; see the key token_dtype")
        else:
            tokens = np.memmap(path, recipe.token_dtype, "r") if path.stat().st_size else np.empty(0, np.uint16)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError(f"{path} must hold a row of integers, got {tokens.dtype} of shape {tokens.shape}")
    if not len(tokens):
        raise InputError(f"{path} is empty")
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= recipe.vocab_size:
        raise InputError(f"{path} holds ids {low} to {high}; with vocab_size {recipe.vocab_size} they must be below it")
    return tokens


def read_csv(path: Path, seed: int) -> Labelled:
    """Labelled texts of a folder with train.csv, val.csv and test.csv, or of one file, shuffled by the seed and split.

    Columns `text` and `label`; the classes are the labels of the training texts, sorted.
    """
    if path.is_dir():
        files = [path / f"{which}.csv" for which in SPLITS]
        if missing := [file.name for file in files if not file.is_file()]:
            raise InputError(f"{path} has no {missing[0]}")
        parts = [_labelled(file) for file in files]
    else:
        files, rows = [path], _labelled(path)
        order = np.random.default_rng(seed).permutation(len(rows))
        parts = [[rows[i] for i in part] for part in split(order)]
    for which, part in zip(SPLITS, parts, strict=True):
        if not part:
            raise InputError(f"{path} has no text for {which}")
    classes = sorted({label for _, label in parts[0]})
    number = {label: i for i, label in enumerate(classes)}
    if unknown := sorted({label for part in parts[1:] for _, label in part} - number.keys()):
        raise InputError(f"{path}: no training text has the label {unknown[0]!r}")
    if len(classes) < 2:
        raise InputError(f"{path}: all training texts have the label {classes[0]!r}")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()
    numbered = ([(text, number[label]) for text, label in part] for part in parts)
    return Labelled(*numbered, classes, str(path), digest)


def _labelled(path: Path) -> list[tuple[bytes, str]]:
    csv.field_size_limit(1 << 24)
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:  # which Excel begins with a mark
            reader = csv.DictReader(file, strict=True)
            columns = reader.fieldnames or []
            if not {"text", "label"} <= set(columns):
                raise InputError(f"{path} needs the columns text and label, has {', '.join(columns) or 'none'}")
            rows = []
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(
                        f"{path}, line {reader.line_num}: not the {len(columns)} fields of the header; "
                        "a text with a comma belongs in quotes"
                    )
                rows.append((row["text"], row["label"].strip()))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    for number, (text, label) in enumerate(rows, 1):
        if not text or not label:
            raise InputError(f"{path}: text or label of row {number} is empty")
    return [(text.encode(), label) for text, label in rows]
