"""The harness of every benchmark: measures each row in a process of its own, and records it.

A process of its own makes the memory figures those of one row, and makes a row out of running out of memory. What is
timed is built there by the function that the task names; see `Task` and `Work`.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .records import ROOT, SUBJECT, Results, new_row

START_SECONDS = 10  # imports and building, roughly
HANG_SECONDS = 60  # how much longer than allowed a row's process may live
OUT_OF_MEMORY = "out of memory"


class GateError(Exception):
    """A result is wrong, so its speed is not worth measuring."""


@dataclass(frozen=True)
class Task:
    """One row to measure.

    Attributes:
        build: "module:function"; called with `subject`, `device`, `dtype` and `extra` as keyword arguments, returns a
            `Work`.
        subject: columns of `SUBJECT`; those left out stay empty.
        cost: in proportion to the expected time, or growing slower: foretells it from smaller sizes of the same.
        threads: None for torch's own choice.
        extra: further arguments of `build`, not in the row.
    """

    build: str
    subject: dict
    cost: float
    device: str = "cpu"
    dtype: str = "float32"
    threads: int | None = None
    extra: dict = field(default_factory=dict)

    @property
    def series(self) -> tuple:
        """What tasks of the same at different sizes have in common."""
        sizes = ("height", "width")
        return (self.device, self.dtype, *(self.subject.get(name) for name in SUBJECT if name not in sizes))

    def __str__(self) -> str:
        return f"{self.subject['name']} {self.subject['height']}x{self.subject['width']} {self.subject['mode']}"


@dataclass(frozen=True)
class Work:
    """What a row times.

    Attributes:
        step: the work; called several times.
        check: takes the first result, raises `GateError` if it is wrong.
        warm_up: something tiny of the same kind, so that what starts up once is in no figure.
        facts: further columns of the row, found after the measurement.
    """

    step: Callable[[], object]
    check: Callable[[object], None]
    warm_up: Callable[[], object] = lambda: None
    facts: Callable[[], dict] = dict


def check_results(results: Sequence, shape: tuple[int, ...]) -> None:
    """Raise GateError unless the first of these tensors has the shape, and all values of all are finite."""
    if results[0].shape != shape or not all(x.isfinite().all() for x in results):
        raise GateError("a result has another shape than it should, or values that are not finite")


@dataclass(frozen=True)
class Limits:
    """What a run may take.

    Attributes:
        seconds: for one call; a task that would take longer, going by its smaller sizes, is skipped.
        memory_gib: for a process on the CPU; None: nine tenths of what is free.
        repeat_seconds: calls are repeated for so long, and at least 3 times; a longer call is made once.
        total_seconds: for the run, starts of processes included; None: any.
    """

    seconds: float = 120.0
    memory_gib: float | None = None
    repeat_seconds: float = 3.0
    total_seconds: float | None = None


def run(tasks: Iterable[Task], results: Results, limits: Limits, fresh: bool = False) -> list[dict]:
    """Measure tasks in order (the smaller sizes first) and return their rows.

    A task that `results` holds is not run again, unless `fresh`.

    Raises:
        GateError: when a result is wrong; the rows before it are kept.
    """
    from tqdm import tqdm

    end = time.monotonic() + limits.total_seconds if limits.total_seconds else float("inf")
    rows, past = [], _Past()
    with tqdm(list(tasks), unit="row", dynamic_ncols=True) as bar:
        for task in bar:
            bar.set_description(str(task))
            row = new_row(task.subject, task.device, task.dtype, task.threads)
            known = None if fresh else results.measured(row)
            if known is None:
                left = end - time.monotonic()
                status = past.why_skip(task, limits.seconds, left)
                known = row | ({"status": status} if status else measure(task, limits, left))
                results.append(known)
            past.learn(task, known)
            rows.append(known)
    return rows


def measure(task: Task, limits: Limits, seconds_left: float = float("inf")) -> dict:
    """The result columns of a task, measured in a new process.

    Raises:
        GateError: when the result is wrong.
    """
    order = {name: getattr(task, name) for name in ("build", "subject", "device", "dtype", "threads", "extra")}
    order |= {"memory_gib": limits.memory_gib, "repeat_seconds": limits.repeat_seconds}
    timeout = min(limits.seconds + limits.repeat_seconds + HANG_SECONDS, seconds_left)
    arguments = [sys.executable, "-m", "benchmarks.worker"]
    try:
        child = subprocess.run(
            arguments, input=json.dumps(order), cwd=ROOT, capture_output=True, text=True, timeout=max(1, timeout)
        )
    except subprocess.TimeoutExpired:
        return {"status": f"skipped: not done after {timeout:.0f} s"}
    if child.returncode == -9:  # by the kernel
        return {"status": OUT_OF_MEMORY}
    if child.returncode:
        errors = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
        return {"status": f"failed: {errors[-1]}"[:200]}
    answer = json.loads(child.stdout.splitlines()[-1])
    if "gate" in answer:
        raise GateError(f"{task}: {answer['gate']}")
    return {name: str(value) for name, value in answer.items()}


class _Past:
    """What the rows so far tell about the larger sizes of the same."""

    def __init__(self):
        self._measured: dict[tuple, tuple[float, float]] = {}  # cost, seconds
        self._given_up: dict[tuple, str] = {}

    def learn(self, task: Task, row: dict) -> None:
        status = row["status"]
        if status == "ok":
            self._measured[task.series] = (task.cost, float(row["median_ms"]) / 1000)
        elif status == OUT_OF_MEMORY or status.startswith(("not installed", "skipped: not done")):
            self._given_up.setdefault(task.series, status)

    def why_skip(self, task: Task, seconds: float, left: float) -> str | None:
        """The status of a task that is not worth starting."""
        if status := self._given_up.get(task.series):
            if status.startswith("not"):
                return status
            return f"skipped: a smaller size was {status.removeprefix('skipped: ')}"
        cost, measured = self._measured.get(task.series, (task.cost, 0.0))
        expected = measured * task.cost / cost
        if expected > seconds:
            return f"skipped: would take {expected:.0f} s or more, allowed are {seconds:.0f}"
        if START_SECONDS + expected > left:
            return f"skipped: would take {START_SECONDS + expected:.0f} s or more, {max(0, left):.0f} are left"
        return None


def idle_cpus() -> int:
    """How many processors other programs leave, at least 1; known on Linux only, elsewhere all. Warns of busy ones.

    Two threads on a processor and a half can take many times as long as one thread, as each waits for the other.
    """
    count = os.cpu_count() or 1
    if not Path("/proc/stat").exists():
        return count

    def ticks() -> list[int]:  # user, nice, system, idle, waiting, ..., in hundredths of a second
        return [int(n) for n in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]]

    before = ticks()
    time.sleep(0.5)
    spent = [b - a for a, b in zip(before, ticks(), strict=True)]
    idle = count * sum(spent[3:5]) / max(1, sum(spent))
    if idle > count - 0.3:
        return count
    print(f"Warning: other programs keep {count - idle:.1f} of {count} processors busy: times may be far too long.")
    return max(1, int(idle))


def text_table(header: list[str], rows: list[list]) -> str:
    """A table as text, the first column to the left, the others to the right."""
    lines = [[str(cell) for cell in line] for line in (header, *rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "  ".join(c.rjust(w) if i else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))).rstrip()
        for line in lines
    )
