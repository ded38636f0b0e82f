"""Batches of token windows and of labelled texts; what is random in them depends on seed, epoch and place alone."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ..training.data import EvalBatches, TrainBatches
from ..training.engine import Processes
from ..training.seeding import MASK, ORDER
from .corpus import SPLITS, Corpus
from .recipe import TextRecipe

IGNORED = -100  # the target of a token that is not to be predicted
MASK_RATE = 0.15  # of the tokens are to be predicted by a masked model
OTHER_SHARE = 0.1  # of these, the share shown as any token, and the same share shown as it is


class WindowBatches(TrainBatches):
    """As `TrainBatches`, of windows that start anywhere: the keys are `(epoch, start)`."""

    starts: int

    def order(self) -> list[int]:
        return np.random.default_rng((ORDER, self.seed, self.epoch)).integers(0, self.starts, self.count).tolist()


class Windows:
    """The batches `(ids, targets)`, each `[B, context]`, whose windows begin where keys `(epoch, start)` say."""

    def __init__(self, recipe: TextRecipe, data: Sequence, batches: Sequence | TrainBatches | EvalBatches):
        self.recipe, self.data, self.batches = recipe, data, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, ...]]:
        return map(self.batch, self.batches)

    def batch(self, keys: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        """That of some keys."""
        found = [window(self.recipe, self.data, start, (epoch, start)) for epoch, start in keys]
        return tuple(map(torch.stack, zip(*found, strict=True)))


def window(recipe: TextRecipe, data: np.ndarray, start: int, place: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Ids and targets `[n]` of the window from `start`, `n` at most the context.

    Causal: the target is the next token. Masked: `MASK_RATE` of the tokens are to be predicted, and of those 80 % are
    shown as the mask, 10 % as any token, 10 % as they are; which, and as what, depends on the seed and `place`.
    """
    if recipe.task == "causal":
        ids = torch.from_numpy(data[start : start + recipe.context + 1].astype(np.int64))
        return ids[:-1], ids[1:]
    ids = data[start : start + recipe.context].astype(np.int64)
    targets = np.full_like(ids, IGNORED)
    generator = np.random.default_rng((MASK, recipe.seed, *place))
    chosen = generator.permutation(len(ids))[: max(1, round(MASK_RATE * len(ids)))]
    targets[chosen] = ids[chosen]
    chance, other = generator.random(len(chosen)), generator.integers(0, recipe.ids, len(chosen))
    masked = chance >= 2 * OTHER_SHARE
    ids[chosen] = np.where(masked, recipe.ids, np.where(chance < OTHER_SHARE, other, ids[chosen]))
    return torch.from_numpy(ids), torch.from_numpy(targets)


def cover(recipe: TextRecipe, tokens: int, piece: int, processes: Processes) -> list[list[tuple[int, int]]]:
    """This process's batches of `piece` windows that lie side by side, so that every token is predicted once (causal:
    but the first of all), or `eval_windows` of them, spread evenly. The last one may be shorter: a batch by itself, and
    not among those spread."""
    context, most = recipe.context, recipe.eval_windows
    whole, rest = divmod(tokens - (recipe.task == "causal"), context)
    numbers, short = list(range(whole)), [whole] if rest else []
    if most is not None and most < whole:
        numbers, short = np.linspace(0, whole - 1, most).round().astype(int).tolist(), []
    keys = [(0, number * context) for number in numbers[processes.rank :: processes.world]]
    batches = [keys[i : i + piece] for i in range(0, len(keys), piece)]
    last = processes.rank == len(numbers) % processes.world
    return batches + [[(0, number * context)] for number in short if last]


class Texts(Windows):
    """The batches `(ids [B, N], labels [B], key_mask [B, N])` of the texts that keys `(epoch, index)` say, cut at the
    context, right-padded."""

    def batch(self, keys: list[tuple[int, int]]) -> tuple[Tensor, ...]:
        texts, labels = zip(*(self.data[index] for _, index in keys), strict=True)
        ids, key_mask = padded([text[: self.recipe.context] for text in texts])
        return ids, torch.tensor(labels), key_mask


def padded(texts: list[bytes]) -> tuple[Tensor, Tensor]:
    """Bytes as ids `[B, longest]` and the mask of those that exist."""
    ids = torch.zeros(len(texts), max(map(len, texts)), dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return ids, torch.arange(ids.shape[1]) < torch.tensor([[len(text)] for text in texts])


def make_batches(recipe: TextRecipe, corpus: Corpus, processes: Processes, accum: int) -> list[Windows]:
    """This process's batches for training, validation and the test."""
    parts, share = [getattr(corpus, which) for which in SPLITS], (processes.rank, processes.world)
    if recipe.task == "classify":
        train = TrainBatches(len(parts[0]), recipe.batch_size, accum, *share, recipe.seed, "texts")
        held_out = [EvalBatches(len(part), train.piece, *share) for part in parts[1:]]
        return [Texts(recipe, *pair) for pair in zip(parts, [train, *held_out], strict=True)]
    updates = recipe.updates_per_epoch or max(1, len(parts[0]) // (recipe.context * recipe.batch_size))
    train = WindowBatches(updates * recipe.batch_size, recipe.batch_size, accum, *share, recipe.seed, "windows")
    train.starts = len(parts[0]) - recipe.context + (recipe.task != "causal")
    held_out = [cover(recipe, len(part), train.piece, processes) for part in parts[1:]]
    return [Windows(recipe, *pair) for pair in zip(parts, [train, *held_out], strict=True)]
