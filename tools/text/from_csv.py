"""Labelled texts of a CSV file with the columns text and label."""

import csv
from pathlib import Path

from ..ending import InputError


def read(path: Path, ids: int) -> list[tuple[bytes, str]]:
    """Texts as bytes, of which there are 256 `ids`, with their labels."""
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


def numbered(parts: list[list[tuple[bytes, str]]], path: Path) -> tuple[list[list[tuple[bytes, int]]], list[str]]:
    """The splits with class numbers in the place of labels, and the classes: the training labels, sorted."""
    classes = sorted({label for _, label in parts[0]})
    number = {label: i for i, label in enumerate(classes)}
    if unknown := sorted({label for part in parts[1:] for _, label in part} - number.keys()):
        raise InputError(f"{path}: no training text has the label {unknown[0]!r}")
    if len(classes) == 1:
        raise InputError(f"{path}: all training texts have the label {classes[0]!r}")
    return [[(text, number[label]) for text, label in part] for part in parts], classes
