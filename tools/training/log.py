"""What a run tells: lines on the terminal, a CSV file, TensorBoard."""

import csv
import io
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path

from ..ending import InputError
from .checkpoints import write_text

COLUMNS = ("epoch", "lr", "train_loss", "images_per_second", "seconds", "val_loss", "top1", "top5")


class EpochLog:
    """`log.csv`, a row an epoch, and the same in TensorBoard.

    Args:
        folder: of the run.
        epochs: of these many epochs the rows are kept; a resumed run writes the later ones anew.
        tensorboard: write event files too.
        columns: of a row, the first one "epoch".
    """

    def __init__(self, folder: Path, epochs: int, tensorboard: bool, columns: Sequence[str] = COLUMNS):
        self.columns = columns
        self.path = folder / "log.csv"
        self.rows = []
        if epochs and self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["epoch"]) <= epochs]
        self.writer = None
        if tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise InputError("tensorboard is not installed: pip install tensorboard, or --no-tensorboard") from None
            self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=epochs + 1)

    def append(self, row: dict) -> None:
        """Keep a row, on disk at once; keys of `columns`, what is missing stays empty."""
        self.rows.append(row)
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows)
        write_text(self.path, text.getvalue())
        if self.writer:
            for name in self.columns[1:]:
                if name in row:
                    self.writer.add_scalar(name, float(row[name]), row["epoch"])
            self.writer.flush()


class Progress:
    """A line now and then: where the epoch is, loss, images (or what else) per second, time left for the whole run.

    Calling it after an update says whether it wrote one.

    Args:
        epoch, epochs: the one that begins, from 1, and how many there are.
        updates: of an epoch.
        batch_size: images, or what else `unit` names, an update.
        every: seconds between lines.
        log: the process that has none is silent.
    """

    def __init__(
        self,
        epoch: int,
        epochs: int,
        updates: int,
        batch_size: int,
        every: float,
        log: EpochLog | None,
        unit: str = "images",
    ):
        self.unit = unit
        self.epoch, self.epochs, self.updates, self.batch_size = epoch, epochs, updates, batch_size
        self.every, self.quiet = every, log is None
        self.start = self.last = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def __call__(self, update: int, loss: Callable[[], float], lr: float) -> bool:
        now = time.monotonic()
        if self.quiet or now - self.last < self.every or update == self.updates:
            return False
        self.last = now
        pace = (now - self.start) / update
        left = pace * (self.updates * (self.epochs - self.epoch + 1) - update)
        print(
            f"epoch {self.epoch}/{self.epochs}  update {update}/{self.updates}  loss {loss():.4f}  lr {lr:.2e}  "
            f"{self.batch_size / pace:.0f} {self.unit}/s  left {duration(left)}",
            flush=True,
        )
        return True


def duration(seconds: float) -> str:
    """As h:mm:ss."""
    return str(timedelta(seconds=round(seconds)))
