"""Prepares "100 English Novels" (github.com/computationalstylistics/100_english_novels) for tools/train_text.py.

    python research/novels.py novels_100.tar.xz --out data/novels

The archive holds corpus/AUTHOR_TITLE_YEAR.txt, 100 novels of 1840 to 1930: three each by 33 authors, and an anonymous
one. The folder gets train.txt, val.txt and test.txt, bytes of novels by different authors, and in authors/ train.csv,
val.csv and test.csv: passages with their author, of an author's latest novel for the test, of the others for training,
of the last tenth of these for validation.
"""

import argparse
import csv
import sys
import tarfile
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.ending import InputError, ending

# Every eleventh author, in the order of their names: three for validation, three for the test.
VAL, TEST, EVERY = 3, 7, 11
PASSAGE = 4096  # characters
PASSAGES = 20  # of a novel, at most


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="novels_100.tar.xz, or a folder with corpus/")
    parser.add_argument("--out", type=Path, default=Path("data/novels"), metavar="DIR", help="(data/novels)")
    return parser.parse_args(argv)


@ending()
def main(argv: list[str] | None = None) -> None:
    """Write the folder."""
    args = parse(argv)
    novels = read_novels(args.archive)
    names = sorted({author for author, _, _ in novels})
    texts = defaultdict(list)
    for author, _, text in novels:
        texts[{VAL: "val", TEST: "test"}.get(names.index(author) % EVERY, "train")].append(text)
    args.out.mkdir(parents=True, exist_ok=True)
    for which, found in texts.items():
        (args.out / f"{which}.txt").write_text("\n\n".join(found), encoding="utf-8", newline="\n")
    rows = author_rows(novels)
    (args.out / "authors").mkdir(exist_ok=True)
    for which, found in rows.items():
        with (args.out / "authors" / f"{which}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *found])
    held = [[name for i, name in enumerate(names) if i % EVERY == at] for at in (VAL, TEST)]
    print(f"{len(novels)} novels of {len(names)} authors; validation: {', '.join(held[0])}; test: {', '.join(held[1])}")
    print(*(f"{which}: {len(texts[which])} novels, {len(rows[which])} passages" for which in texts), sep="\n")


def read_novels(path: Path) -> list[tuple[str, int, str]]:
    """Author, year and text of every novel, in the order of the files' names."""
    if path.is_dir():
        files = {file.name: file.read_bytes() for file in (path / "corpus").glob("*.txt")}
    elif path.is_file():
        with tarfile.open(path) as archive:
            members = [x for x in archive if x.isfile() and x.name.endswith(".txt") and "corpus/" in x.name]
            files = {Path(member.name).name: archive.extractfile(member).read() for member in members}
    else:
        raise InputError(f"there is no {path}")
    if not files:
        raise InputError(f"{path} has no corpus/AUTHOR_TITLE_YEAR.txt")
    novels = []
    for name, data in sorted(files.items()):
        author, *_, year = Path(name).stem.split("_")
        novels.append((author, int(year[:4]), data.decode("utf-8-sig").replace("\r\n", "\n")))
    return novels


def author_rows(novels: list[tuple[str, int, str]]) -> dict[str, list[tuple[str, str]]]:
    """Passages and authors of each split; authors of a single novel are left out."""
    rows, of_author = defaultdict(list), defaultdict(list)
    for author, year, text in novels:
        of_author[author].append((year, text))
    for author, found in of_author.items():
        if len(found) < 2:
            continue
        *earlier, (_, latest) = sorted(found)
        rows["test"] += [(passage, author) for passage in passages(latest)]
        for _, text in earlier:
            end = len(text) * 9 // 10
            rows["train"] += [(passage, author) for passage in passages(text[:end])]
            rows["val"] += [(passage, author) for passage in passages(text[end:])[:3]]
    return rows


def passages(text: str) -> list[str]:
    """At most `PASSAGES` of `PASSAGE` characters, evenly spread."""
    whole = len(text) // PASSAGE
    count = min(whole, PASSAGES)
    starts = [i * whole // count * PASSAGE for i in range(count)]
    return [text[start : start + PASSAGE] for start in starts]


if __name__ == "__main__":
    sys.exit(main())
