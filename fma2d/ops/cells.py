"""Cells of queries, their windows of keys, and softmaxes under way: what all parts of the torch backend speak of."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..geometry import subcells

# Scores are held for about this many (query, key) pairs at a time: they stay in cache.
PAIRS = 1 << 20
# Stands for -inf, so that no inf - inf arises; what is below half of it has attended to nothing.
ABSENT = -1e30


@dataclass(frozen=True)
class Windows:
    """Cells and their windows.

    Attributes:
        query_cell: query positions per cell, an axis each.
        key_cell: key positions per cell, an axis each.
        after: cells of the window after the own one (1; 0 if causal). There is always one before.
        exclude: `[query_cell, window]` bool an axis, or None; a pair is excluded where every axis says so.
        scale: factor of every score.
    """

    query_cell: tuple[int, ...]
    key_cell: tuple[int, ...]
    after: int
    exclude: tuple[Tensor, ...] | None
    scale: float


class State(NamedTuple):
    """A softmax under way: what queries attended to so far, as further entries of theirs.

    Attributes:
        value, lse: `[B, *entries, heads, head_dim]`, `[B, *entries, heads]`.
        parts: entries per query cell, an axis each, shared by the queries of that part of the cell; None if every
            query has its own.
    """

    value: Tensor
    lse: Tensor
    parts: tuple[int, ...] | None = None


class Piece(Protocol):
    """Some cells, and what they have of arrays `[B, *positions, heads, channels]`: `slabs.Row` or `gather.Run`.

    What is read is indexed by a tile and then is `[cells of the tile, positions, channels]`; it is written whole.
    """

    def tiles(self) -> Iterable:
        """Which together hold each query once."""

    def queries(self, x: Tensor):
        """The positions of the cells."""

    def lses(self, lse: Tensor):
        """The same of `[B, *queries, heads]`, with one channel."""

    def keys(self, x: Tensor):
        """The positions of the cells' windows."""

    def addends(self, bias: Tensor | None):
        """What is added to the scores, of bias `[B | 1, *keys]` and exclusions: `[cells, rows | 1, window]` or None."""

    def before(self, state: State) -> tuple[Tensor, Tensor]:
        """Value and lse that each query has so far."""

    def carried(self, state: State):
        """Shared entries: their scores `[cells, rows, entries]` and values `[cells, entries, channels]`."""

    def write(self, x: Tensor, data: Tensor) -> None:
        """Queries' values into x."""

    def add(self, x: Tensor, data: Tensor, scale: float) -> None:
        """`scale` times queries' values to x."""

    def add_keys(self, x: Tensor, data) -> None:
        """Windows' values to x, where they overlap too."""

    def write_carried(self, state: State, carried) -> None:
        """Shared entries into a state."""


def part_index(parts: list[tuple[int, ...]], extents: list[int], device: torch.device) -> Tensor:
    """Row-major index of the entries that positions read, from each axis' `parts[axis][position]`."""
    index = torch.zeros(1, dtype=torch.long, device=device)
    for part, extent in zip(parts, extents, strict=True):
        index = (index[:, None] * extent + torch.tensor(part, device=device)).flatten()
    return index


def own_parts(cell: tuple[int, ...], parts: tuple[int, ...], device: torch.device) -> tuple[Tensor, ...]:
    """An axis each: which of the parts of a cell holds each of its positions, `[positions, parts]` bool."""
    return tuple(
        torch.tensor(subcells(c, c, p), device=device)[:, None] == torch.arange(p, device=device)
        for c, p in zip(cell, parts, strict=True)
    )


def is_followed() -> bool:
    """Whether autograd or torch.func follows what is computed: nothing may be overwritten then."""
    return torch.is_grad_enabled() or forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()
