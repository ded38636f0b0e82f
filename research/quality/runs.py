"""One run: a task, an attention layer, a seed. It goes on where it was stopped, and ends as two pieces of CSV."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import records
from tools.ending import InputError
from tools.training.checkpoints import load_state, remove_unfinished, save_state
from tools.training.engine import Processes, Training
from tools.training.recipe import Recipe
from tools.training.seeding import WEIGHTS, seed_at

from .model import build, count, levels, matched_ratio
from .tasks import IGNORE, TASKS, Batch, Task

POINTS = 10  # of a learning curve; after each the state is saved
KEY = ("task", "variant", "seed", "steps", "cell_sizes", "rank")
SCORES = ("score", "long_range", "val_loss")
ORIGIN = ("machine", "threads", "torch", "timm", "fma2d", "timestamp", "commit", "command")
COLUMNS = (*KEY, "levels", "params", "mlp_ratio", "batch_size", "lr", "measure", *SCORES, "cpu_seconds", *ORIGIN)
CURVE_COLUMNS = (*KEY, "step", "train_loss", *SCORES)


@dataclass(frozen=True)
class Run:
    """What decides how a run ends. `cell_sizes` are joined by blanks, one a stage, and so are `levels` in the rows."""

    task: str
    variant: str
    seed: int
    steps: int
    cell_sizes: str
    rank: int

    @property
    def key(self) -> tuple[str, ...]:
        """As in the files, all strings."""
        return tuple(str(getattr(self, name)) for name in KEY)

    @property
    def cells(self) -> list[int]:
        return [int(cell) for cell in self.cell_sizes.split()]

    @property
    def folder(self) -> str:
        return "-".join(self.key).replace(" ", "_")

    def __str__(self) -> str:
        return f"{self.task} {self.variant} seed {self.seed}"


def make_run(
    task: Task, variant: str, seed: int, steps: int | None = None, cell_size: int | None = None, rank: int | None = None
) -> Run:
    """A run with the task's own settings where None is given; `cell_size` is for all stages.

    Raises:
        InputError: where no level is coarse, or `steps` cannot be cut into the points of a curve.
    """
    cells = task.cell_sizes if cell_size is None else (cell_size,) * len(task.dims)
    levels(task, cells)
    steps = task.steps if steps is None else steps
    if steps < POINTS or steps % POINTS:
        raise InputError(f"steps must be a multiple of {POINTS}, got {steps}: a learning curve has so many points")
    return Run(task.name, variant, seed, steps, " ".join(map(str, cells)), task.rank if rank is None else rank)


@dataclass(frozen=True)
class Batches:
    """The batches of one piece of a run; batch `i` of the run depends on the seed and on `i` alone."""

    task: Task
    seed: int
    first: int
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Batch]:
        for step in range(self.first, self.first + self.count):
            yield self.task.draw(np.random.default_rng((self.seed, step)), self.task.batch_size)


def train(run: Run, folder: Path, progress: Callable[[int, float | None], object]) -> tuple[dict, list[dict]]:
    """Make a run, or the rest of it; gives its row, and the points of its curve.

    Args:
        folder: of this run; holds `state.pt` from the first point on.
        progress: called with the number of steps just made and the last score.

    Raises:
        InputError: for a state of another run or version, weights that are not finite, a disk that is full.
    """
    task, state_file = TASKS[run.task], folder / "state.pt"
    ratio = matched_ratio(task, run.variant, run.cells, run.rank)
    model, training = make_training(run, ratio)
    curve, spent = [], 0.0
    folder.mkdir(parents=True, exist_ok=True)
    remove_unfinished(folder)
    if state_file.exists():
        state = load_state(state_file)
        if state["run"] != asdict(run):
            raise InputError(f"{state_file} is of another run, {state['run']}; remove the folder or name another")
        training.load_state_dict(state["training"])
        curve, spent = state["curve"], state["cpu_seconds"]
    steps = run.steps // POINTS
    progress(training.epoch * steps, None)
    score = None

    def after_step(update: int, loss: Callable[[], float], lr: float) -> bool:
        progress(1, score)
        return False

    while training.epoch < POINTS:
        start = time.process_time()
        loss = training.train_epoch(Batches(task, run.seed, training.epoch * steps, steps), after_step)
        scores = evaluate(model, task)
        score = scores["score"]
        curve.append(dict(step=training.epoch * steps, train_loss=loss) | scores)
        spent += time.process_time() - start
        state = dict(run=asdict(run), mlp_ratio=ratio, training=training.state_dict(), curve=curve, cpu_seconds=spent)
        save_state(state_file, state)
    return finished_row(run, model, ratio, curve[-1], spent), [dict(zip(KEY, run.key, strict=True)) | p for p in curve]


def make_training(run: Run, ratio: float) -> tuple[nn.Module, Training]:
    """The run's model and its training from the start: AdamW, a tenth of the steps warm-up, cosine.

    Gradients are not clipped: where a background is exactly 0, a new patch embedding gives 0, the gradient of the norm
    behind it is a million times that of all else, and clipping would leave nothing of the rest.
    """
    task = TASKS[run.task]
    seed_at(WEIGHTS, run.seed)
    model = build(task, run.variant, run.cells, run.rank, ratio)
    recipe = Recipe(seed=run.seed, epochs=POINTS, batch_size=task.batch_size, lr=task.lr, warmup_epochs=1)
    training = Training(recipe, model, Processes(torch.device("cpu")), run.steps // POINTS, accum=1)
    training.loss = nn.CrossEntropyLoss(ignore_index=IGNORE)
    return model, training


def trained_model(state_file: Path) -> tuple[nn.Module, Run]:
    """The model of a run's state, in evaluation mode, and the run.

    Raises:
        InputError: for a file that is not such a state, or one of a run that has not ended.
    """
    state = load_state(state_file)
    if "run" not in state or state["training"]["epoch"] < POINTS:
        raise InputError(f"{state_file} is not the state of a finished run of research.compare_attention")
    run = Run(**state["run"])
    model = build(TASKS[run.task], run.variant, run.cells, run.rank, state["mlp_ratio"])
    model.load_state_dict(state["training"]["model"])
    return model.eval(), run


@cache
def test_set(task: Task) -> Batch:
    """Drawn once a process."""
    return task.test()


@torch.inference_mode()
def evaluate(model: nn.Module, task: Task) -> dict[str, float | None]:
    """`score` and `long_range` in percent (the latter None where a task has no such classes) and the mean loss."""
    model.eval()
    images, labels = test_set(task)
    logits = torch.cat([model(part) for part in images.split(50)])
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE)
    known = labels != IGNORE
    pairs = labels[known] * task.classes + logits.argmax(1)[known]
    confusion = pairs.bincount(minlength=task.classes**2).view(task.classes, task.classes).double()
    hits, long_range = confusion.diag(), None
    if task.measure == "mIoU":
        iou = hits / (confusion.sum(0) + confusion.sum(1) - hits)  # nan for a class that is nowhere
        score, long_range = iou.nanmean(), 100 * iou[list(task.long_range)].nanmean().item()
    else:
        score = hits.sum() / confusion.sum()
    return dict(score=100 * score.item(), long_range=long_range, val_loss=loss.item())


def finished_row(run: Run, model: nn.Module, ratio: float, scores: dict, seconds: float) -> dict[str, str]:
    """The row of a run that has ended; every column a string."""
    task = TASKS[run.task]
    row = asdict(run) | dict(
        levels=" ".join(map(str, levels(task, run.cells))),
        params=count(model),
        mlp_ratio=ratio,
        batch_size=task.batch_size,
        lr=task.lr,
        measure=task.measure,
        cpu_seconds=f"{seconds:.0f}",
    )
    return as_row(row | scores | records.origin(), COLUMNS)


def as_row(values: dict, columns: Sequence[str]) -> dict[str, str]:
    """A row of a file from these values and others."""
    return {name: as_text(values[name]) for name in columns}


def as_text(value) -> str:
    """A cell of a file: figures to four digits after the point, None empty."""
    if isinstance(value, float):
        return f"{value:.4f}".rstrip("0").rstrip(".")
    return "" if value is None else str(value)


def read_rows(path: Path, columns: Sequence[str], key: Sequence[str] = (*KEY, "step")) -> list[dict[str, str]]:
    """The rows of a file, the last of each key (of which a name without a column is no part); [] without a file."""
    return records.latest(records.read_rows(path, columns), key)
