"""The one CSV format of all benchmarks: its columns, its file, and where a row comes from."""

import csv
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What is measured, and under which settings: two rows are of the same thing where all of these agree.
SUBJECT = ("benchmark", "name", "mode", "variant", "height", "width", "batch", "heads", "head_dim", "cell_size", "rank")
SETTING = ("device", "dtype", "machine", "threads", "torch")
KEY = SUBJECT + SETTING
RESULT = ("tokens", "params", "macs", "median_ms", "q10_ms", "q90_ms", "repeats", "base_mib", "peak_mib", "status")
ORIGIN = ("timestamp", "python", "triton", "timm", "fma2d", "commit", "command")
COLUMNS = KEY + RESULT + ORIGIN


class Results:
    """A CSV file of rows, only ever appended to; of two rows with one key the later counts."""

    def __init__(self, path: Path):
        self.path = Path(path)
        self._rows = {}
        if self.path.exists():
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


def append_rows(path: Path, columns: Sequence[str], rows: Sequence[dict]) -> None:
    """Keep rows in a CSV file, on disk at once; the file and its header are made for the first ones."""
    new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def read_rows(path: Path) -> list[dict]:
    """The rows of a results file, every column a string.

    Raises:
        ValueError: for a file with other columns.
    """
    with Path(path).open(newline="") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} is not a results file of this version: its columns differ")
        return list(reader)


def latest(rows: list[dict]) -> list[dict]:
    """One row for each key, the last."""
    return list({tuple(row[name] for name in KEY): row for row in rows}.values())


def total_mib(row: dict) -> float:
    """Peak memory of a row, inputs and weights included."""
    return float(row["base_mib"]) + float(row["peak_mib"])


def new_row(subject: dict, device: str, dtype: str, threads: int | None) -> dict:
    """A row without results: what is to be measured, and where it comes from; every column a string."""
    facts = subject | {
        "device": device,
        "dtype": dtype,
        "machine": machine(device),
        "threads": threads or default_threads(),
        "timestamp": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "fma2d": fma2d_version(),
        "commit": commit(),
        "command": command(),
    }
    facts |= {name: version(name) for name in ("torch", "triton", "timm")}
    return dict.fromkeys(COLUMNS, "") | {name: str(value) for name, value in facts.items()}


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
        changes = git("status", "--porcelain", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("+dirty" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


def command() -> str:
    """The command line of this run, the program's path relative to the repository."""
    program = Path(sys.argv[0]).resolve()
    name = str(program.relative_to(ROOT)) if program.is_relative_to(ROOT) else program.name
    return shlex.join([name, *sys.argv[1:]])
