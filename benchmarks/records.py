"""The one CSV format of all benchmarks: its columns, its file, and where a row comes from."""

import csv
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path

from tools.ending import InputError

ROOT = Path(__file__).resolve().parents[1]

# What is measured, and under which settings: two rows are of the same thing where all of these agree.
SUBJECT = ("benchmark", "name", "mode", "variant", "height", "width", "batch", "heads", "head_dim", "cell_size", "rank")
SETTING = ("device", "dtype", "machine", "threads", "torch")
KEY = SUBJECT + SETTING
RESULT = ("tokens", "params", "macs", "median_ms", "q10_ms", "q90_ms", "repeats", "base_mib", "peak_mib", "status")
ORIGIN = ("timestamp", "python", "triton", "timm", "fma2d", "commit", "command")
COLUMNS = KEY + RESULT + ORIGIN


class RecordsError(InputError):
    """A results file that cannot be read."""


class Results:
    """A CSV file of rows, only ever appended to; of two rows with one key the later counts."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._rows = {}
        for row in read_rows(self.path):
            self._keep(row)

    def _keep(self, row: dict) -> None:
        self._rows[tuple(row[name] for name in KEY)] = row

    def measured(self, row: dict) -> dict | None:
        """The row with the key of `row`, if one ended well."""
        found = self._rows.get(tuple(row[name] for name in KEY))
        return found if found and found["status"] == "ok" else None

    def append(self, row: dict) -> None:
        """Keep a row, on disk at once."""
        self._keep(row)
        append_rows(self.path, COLUMNS, [row])


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Keep these columns of rows in a CSV file, on disk at once; its header is written with the first ones.

    Raises:
        RecordsError: for a file with other columns.
    """
    known = read_rows(path, columns)
    _write(path, columns, rows, "a" if known else "w")


def write_rows(path: Path, columns: Sequence[str], rows: Iterable[dict]) -> None:
    """Write these columns of rows as a CSV file, in the place of what was there."""
    _write(path, columns, rows, "w")


def _write(path: Path, columns: Sequence[str], rows: Iterable[dict], mode: str) -> None:
    lines = [[row[name] for name in columns] for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open(mode, newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows(lines if mode == "a" else [columns, *lines])


def read_rows(path: Path, columns: Sequence[str] = COLUMNS) -> list[dict[str, str]]:
    """The rows of a CSV file; none without a file.

    Raises:
        RecordsError: for a file with other columns, or a folder.
    """
    if not path.exists():
        return []
    try:
        with path.open(newline="") as file:
            reader = csv.DictReader(file)
            if tuple(reader.fieldnames or ()) != tuple(columns):
                raise RecordsError(f"{path} has other columns than this version writes; remove it or name another file")
            return list(reader)
    except (OSError, UnicodeDecodeError) as error:
        raise RecordsError(f"{path} cannot be read as a results file: {error}") from None


def latest(rows: list[dict], key: Sequence[str] = KEY) -> list[dict]:
    """One row for each key, the last; a name that rows have no column of is no part of it."""
    return list({tuple(row.get(name) for name in key): row for row in rows}.values())


def total_mib(row: dict) -> float:
    """Peak memory of a row, inputs and weights included."""
    return float(row["base_mib"]) + float(row["peak_mib"])


def new_row(subject: dict, device: str, dtype: str, threads: int | None) -> dict:
    """A row without results: what is to be measured, and where it comes from; every column a string."""
    facts = origin(device, threads) | subject | dict(device=device, dtype=dtype)
    return {name: str(facts.get(name, "")) for name in COLUMNS}


def origin(device: str = "cpu", threads: int | None = None) -> dict[str, str | int]:
    """Where a row comes from: machine, threads (torch's own number), versions, time, commit, command.

    A results file takes those of them that it has a column for.
    """
    return dict(
        machine=machine(device),
        threads=threads or default_threads(),
        **{name: version(name) for name in ("torch", "triton", "timm")},
        mmseg=version("onedl-mmsegmentation") or version("mmsegmentation"),
        python=platform.python_version(),
        fma2d=fma2d_version(),
        timestamp=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        commit=commit(),
        command=command(),
    )


def children_seconds() -> float:
    """Processor time of the processes run so far: on a machine that others use, it says more than the clock."""
    import resource  # Windows has none; all else here runs there too

    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


@cache
def machine(device: str) -> str:
    """The GPU's name, or the CPU's with its number."""
    if device.startswith("cuda"):
        import torch

        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    models = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} CPUs"


@cache
def default_threads() -> int:
    """Threads that torch uses by itself."""
    import torch

    return torch.get_num_threads()


@cache
def version(distribution: str) -> str:
    """The installed version, or ''."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


@cache
def fma2d_version() -> str:
    """From the source: a checkout need not be installed."""
    return re.search(r'__version__ = "(.*)"', (ROOT / "fma2d" / "__init__.py").read_text())[1]


@cache
def commit() -> str:
    """The checkout's commit, with `+dirty` if files other than results differ from it; '' outside git."""

    def git(*args):
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!research/results")
        return git("rev-parse", "--short", "HEAD") + ("+dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def command() -> str:
    """The command line of this run, the program's path relative to the repository, or a module's name after -m."""
    program = Path(sys.argv[0]).resolve()
    name = str(program.relative_to(ROOT)) if program.is_relative_to(ROOT) else program.name
    module = name.removesuffix(".py").removesuffix("/__main__").replace("/", ".")
    words = ["-m", module] if module.startswith(("benchmarks", "research")) else [name]
    return shlex.join([*words, *sys.argv[1:]])
