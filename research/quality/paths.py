"""The "dashed path" task: two dashed paths, one end marked; which points are joined with the mark by a path?"""

import numpy as np
import torch
from numpy.random import Generator
from PIL import Image, ImageDraw
from scipy.signal import lfilter
from scipy.spatial.distance import cdist
from torch import Tensor

LENGTH = 0.5  # of a path, in widths of the image
STEP = 2.0  # pixels from one point of a path to the next
DASH, PERIOD = 3, 5  # points that are drawn, of each period of so many
APART = 6.0  # pixels that paths keep from each other, and from themselves: more than a token is across
MARK = 2.5  # radius of the mark


def draw(rng: Generator, count: int, size: int, stride: int, ignore: int, ends: bool = False) -> tuple[Tensor, Tensor]:
    """Images `[count, 1, size, size]`, -1 to 1, and labels of their tokens, `[count, size / stride, size / stride]`.

    A token that a path passes is 1 if the path begins at the mark, else 0; all others, and with `ends` also all but the
    last one of each path, are `ignore`.
    """
    images = np.empty((count, 1, size, size), np.float32)
    labels = np.full((count, size // stride, size // stride), ignore)
    for image, label in zip(images, labels, strict=True):
        pair = two_paths(rng, size)
        image[0] = drawing(rng, pair, size)
        for path, joined in zip(pair, (1, 0), strict=True):
            cols, rows = (path[-1:] if ends else path).astype(int).T // stride
            label[rows, cols] = joined
    return torch.from_numpy(images) / 127.5 - 1, torch.from_numpy(labels)


def drawing(rng: Generator, pair: tuple[np.ndarray, np.ndarray], size: int, gaps: bool = True) -> np.ndarray:
    """Two paths, dashed or not, with a disc where the first begins: `[size, size]` uint8."""
    image = Image.new("L", (size, size))
    pen = ImageDraw.Draw(image)
    for path in pair:
        points = [tuple(point) for point in path]
        starts = range(-int(rng.integers(PERIOD)), len(points), PERIOD)
        for dash in [points[max(0, i) : max(0, i + DASH)] for i in starts] if gaps else [points]:
            if len(dash) > 1:
                pen.line(dash, fill=255, width=2)
    x, y = pair[0][0]
    pen.ellipse((x - MARK, y - MARK, x + MARK, y + MARK), fill=255)
    return np.asarray(image)


def two_paths(rng: Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Two paths of the same length that stay apart."""
    points = round(LENGTH * size / STEP)
    while True:
        first = wander(rng, size, points, np.empty((0, 2)))
        for _ in range(20 if first is not None else 0):
            second = wander(rng, size, points, first)
            if second is not None:
                return first, second


def wander(rng: Generator, size: int, points: int, others: np.ndarray) -> np.ndarray | None:
    """A smooth random path `[points, 2]`; None if it leaves the image or comes too near to itself or to `others`."""
    edge, recent = MARK + 1, int(APART / STEP) + 1
    bends = lfilter([1], [1, -0.7], rng.normal(0, 0.15, points - 1))  # each 0.7 of the one before, and some noise
    headings = rng.uniform(0, 2 * np.pi) + bends.cumsum()
    moves = STEP * np.stack((np.cos(headings), np.sin(headings)), 1)
    path = rng.uniform(edge, size - edge, 2) + np.concatenate((np.zeros((1, 2)), moves.cumsum(0)))
    if path.min() < edge or path.max() > size - edge:
        return None
    if (len(others) and cdist(path, others).min() < APART) or np.triu(cdist(path, path) < APART, recent).any():
        return None
    return path
