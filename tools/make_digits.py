"""Writes scikit-learn's digits as an ImageFolder: a small, real data set that needs no download.

1797 scans of handwritten digits, 8 x 8 pixels, 16 shades of grey (UCI "Optical Recognition of Handwritten Digits",
CC BY 4.0, the copy in scikit-learn), enlarged to OUT/{train,val}/{0..9}/NNNN.png. A fifth of each digit, the same
images every time, is for validation.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from PIL import Image

from tools.ending import InputError, ending

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A folder to write into that becomes `out`, which must not be there or be empty, or vanishes in an error."""
    unfinished = out.with_name(f".{out.name}.{uuid4().hex}.unfinished")
    try:
        unfinished.mkdir(parents=True)
        yield unfinished
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_digits(out: Path, size: int) -> dict[str, int]:
    """Write the folder, whole or not at all; returns the number of images in each split."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    train, val = train_test_split(range(len(pixels)), test_size=0.2, stratify=digits.target, random_state=0)
    with whole_folder(out) as folder:
        for split, indices in (("train", train), ("val", val)):
            for index in indices:
                path = folder / split / str(digits.target[index]) / f"{index:04}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[index]).resize((size, size), Image.Resampling.BICUBIC).save(path)
    return {"train": len(train), "val": len(val)}


@ending()
def main(argv: list[str] | None = None) -> None:
    """Write the data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "digits", help="folder to write (data/digits)")
    parser.add_argument("--size", type=int, default=32, help="pixels a side (32)")
    args = parser.parse_args(argv)
    if args.size < 1:
        parser.error(f"--size must be at least 1, got {args.size}")
    if args.out.exists():
        raise InputError(f"{args.out} exists already; remove it, or name another with --out")
    counts = write_digits(args.out, args.size)
    print(f"{args.out}: {counts['train']} images for training, {counts['val']} for validation, {args.size} px")


if __name__ == "__main__":
    sys.exit(main())
