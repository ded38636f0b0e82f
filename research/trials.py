"""Trials: what is planned and not recorded is made one by one, and each one's rows are kept as it ends."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from benchmarks.records import ROOT, append_rows, commit, read_rows

RESULTS, FIGURES = ROOT / "research" / "results", ROOT / "research" / "figures"

Trial = TypeVar("Trial")


def make_missing(
    planned: Iterable[Trial],
    path: Path,
    columns: Sequence[str],
    key: Sequence[str],
    key_of: Callable[[Trial], tuple[str, ...]],
    make: Callable[[Trial, str], dict[str, str] | None],
) -> bool:
    """Make the trials that a results file does not hold; False as soon as one fails.

    Args:
        path: the CSV file, read first, appended to after each trial.
        key: the columns by which rows are told apart.
        key_of: what a trial has in these columns.
        make: makes a trial and gives its row, or None if it fails; it is told how far the work is, such as "2/7".
    """
    planned = list(planned)
    done = {tuple(row[name] for name in key) for row in read_rows(path, columns)}
    missing = [trial for trial in planned if key_of(trial) not in done]
    print(f"{len(planned)} runs, {len(planned) - len(missing)} of them in {path}")
    commit()  # cached: what is written later is of the code that runs now
    for i, trial in enumerate(missing, 1):
        row = make(trial, f"{i}/{len(missing)}")
        if row is None:
            return False
        append_rows(path, columns, [row])
    return True
