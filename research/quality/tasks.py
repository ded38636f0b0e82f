"""The tasks: images with a label each, or a label for each token; small enough for a CPU.

A task draws its training batches from a random generator, so batch `i` of a run depends on the run's seed and on `i`
alone; its test set is the same in every run. All but the digits are generated.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.nn import functional as F

from tools import make_scenes

from . import paths

IGNORE = -100  # the label of tokens that do not count
STRIDE = 4  # pixels a side of a token of the first stage
Batch = tuple[Tensor, Tensor]  # images `[N, C, H, W]` float32, labels `[N]` or `[N, H / STRIDE, W / STRIDE]` int64


@dataclass(frozen=True)
class Task:
    """A task, and the skeleton and training that all attention layers get on it.

    Attributes:
        what: in a line.
        draw: `(generator, count)` to a training batch.
        test: the test set.
        measure: "accuracy" (of all labels that count) or "mIoU".
        size: pixels a side.
        dims, depths, cell_sizes, reductions: a value per stage; reductions are those of MiT's attention.
        long_range: classes whose mean IoU is told apart, because they can be told from far context only.
    """

    name: str
    what: str
    draw: Callable[[Generator, int], Batch]
    test: Callable[[], Batch]
    classes: int
    size: int
    dims: tuple[int, ...]
    depths: tuple[int, ...]
    cell_sizes: tuple[int, ...]
    reductions: tuple[int, ...]
    steps: int
    lr: float
    measure: str = "accuracy"
    labels_tokens: bool = False
    in_chans: int = 1
    rank: int = 1
    head_dim: int = 16
    batch_size: int = 16
    long_range: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.name

    @property
    def grids(self) -> list[tuple[int, int]]:
        """Tokens of each stage."""
        sides = [-(-self.size // (STRIDE * 2**i)) for i in range(len(self.dims))]
        return [(side, side) for side in sides]


def test_generator() -> Generator:
    """Of test sets: another stream than that of any run."""
    return np.random.default_rng((1 << 32) - 1)


@cache
def digits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's digits `[N, 8, 8]` in 0 to 1 and their labels: "train" (1437), "test" (360)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    train, test = train_test_split(range(len(data.target)), test_size=0.2, stratify=data.target, random_state=0)
    images = (data.images / 16).astype(np.float32)
    return {name: (images[rows], data.target[rows]) for name, rows in (("train", train), ("test", test))}


CANVAS = 48  # pixels a side of "look afar", 12 x 12 tokens


def look_afar(rng: Generator, count: int, split: str) -> Batch:
    """Two digits of 8 x 8 pixels, 2 x 2 tokens, at opposite edges; each one's tokens at the edge must name the other.

    The edges are left and right or top and bottom; along them each digit lies at any token. In two blocks, neither the
    near field of cells of 2 tokens nor windows of 6, with all convolutions, bring anything from one to the other.
    """
    images, labels = digits()[split]
    chosen = rng.integers(len(images), size=(count, 2))
    along = rng.integers(CANVAS // STRIDE - 1, size=(count, 2))
    upright, swap = rng.random(count) < 0.5, rng.random(count) < 0.5
    x = np.zeros((count, CANVAS, CANVAS), np.float32)
    y = np.full((count, CANVAS // STRIDE, CANVAS // STRIDE), IGNORE)
    for i in range(count):
        for one, other in ((0, 1), (1, 0)):
            first = (one == 0) != swap[i]
            canvas, tokens = (x[i].T, y[i].T) if upright[i] else (x[i], y[i])
            row, col = along[i, one], 0 if first else CANVAS // STRIDE - 2
            digit = images[chosen[i, one]]
            canvas[row * STRIDE :, col * STRIDE :][:8, :8] = digit.T if upright[i] else digit
            tokens[row : row + 2, 0 if first else -1] = labels[chosen[i, other]]
    return torch.from_numpy(x)[:, None], torch.from_numpy(y)


SCENES = dict(train=800, val=100)
SCENE_CLASSES = [name for name in make_scenes.LABELS if name != "other"]


@cache
def scenes(split: str) -> Batch:
    """Generated scenes of seed 0 at half their size, `[N, 3, 64, 64]`, and each token's label, that of its middle."""
    textures = make_scenes.load_textures()
    drawn = [make_scenes.scene(0, dict(train="training", val="validation")[split], i, textures)
             for i in range(SCENES[split])]  # fmt: skip
    images, labels = (torch.from_numpy(np.stack(part)) for part in zip(*drawn, strict=True))
    index = torch.full((256,), IGNORE)
    index[[make_scenes.LABELS[name] for name in SCENE_CLASSES]] = torch.arange(len(SCENE_CLASSES))
    tokens = labels[:, STRIDE :: 2 * STRIDE, STRIDE :: 2 * STRIDE].long()
    return F.avg_pool2d(images.movedim(-1, 1).float() / 127.5 - 1, 2), index[tokens]


def draw_scenes(rng: Generator, count: int) -> Batch:
    """Scenes of the training part, mirrored or not."""
    images, labels = scenes("train")
    chosen, mirror = rng.integers(len(images), size=count), rng.random(count) < 0.5
    images, labels = images[chosen], labels[chosen]
    mirror = torch.from_numpy(mirror)
    images = torch.where(mirror[:, None, None, None], mirrored(images), images)
    return images, torch.where(mirror[:, None, None], mirrored_labels(labels), labels)


def mirrored(images: Tensor) -> Tensor:
    """Moved by one pixel, so that pixel (2, 2) of a token's 4 x 4 stays the one that its label is of."""
    return images.flip(-1).roll(1, -1)


def mirrored_labels(labels: Tensor) -> Tensor:
    return labels.flip(-1)


def dashed_path(size: int, cell_size: int, reductions: tuple[int, int]) -> Task:
    """The task at a size in pixels. Trained are all tokens on a path; tested are the far ends."""
    return Task(
        f"dashed_{size}",
        f"dashed paths, {size} px: is the end of a path joined with the marked point?",
        lambda rng, count: paths.draw(rng, count, size, STRIDE, IGNORE),
        lambda: paths.draw(test_generator(), 300, size, STRIDE, IGNORE, ends=True),
        classes=2,
        size=size,
        dims=(48, 64),
        depths=(2, 2),
        cell_sizes=(cell_size, cell_size),
        reductions=reductions,
        steps=1200,
        lr=2e-3,
        labels_tokens=True,
    )


TASKS = {
    task.name: task
    for task in (
        Task(
            "look_afar",
            "look afar: two digits at opposite edges, each one's tokens must name the other",
            lambda rng, count: look_afar(rng, count, "train"),
            lambda: look_afar(test_generator(), 300, "test"),
            classes=10,
            size=CANVAS,
            dims=(48,),
            depths=(2,),
            cell_sizes=(2,),
            reductions=(2,),
            steps=1500,
            lr=2e-3,
            labels_tokens=True,
            head_dim=24,
        ),
        Task(
            "scenes",
            f"generated scenes ({SCENES['train']} + {SCENES['val']}), 64 px: the class of each token",
            draw_scenes,
            lambda: scenes("val"),
            classes=len(SCENE_CLASSES),
            size=64,
            dims=(32, 48),
            depths=(2, 2),
            cell_sizes=(2, 2),
            reductions=(2, 1),
            steps=900,
            lr=2e-3,
            measure="mIoU",
            labels_tokens=True,
            in_chans=3,
            batch_size=8,
            long_range=tuple(SCENE_CLASSES.index(name) for name in make_scenes.LONG_RANGE),
        ),
        dashed_path(64, 2, (2, 1)),
        dashed_path(128, 4, (2, 2)),
    )
}
