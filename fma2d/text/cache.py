"""What a causal model keeps of earlier tokens, so that the next one costs little.

A layer of fast multipole attention keeps what later queries can still attend to, and what is needed to go on. In units
of one key and one value, a row of `n` tokens has, with cell size `r` and rank `p`,

- `2r` near tokens: those of the last two base cells, token `t` in slot `t mod 2r`;
- `4p` summary tokens for each level: those of the last four cells, cell `c` in slot `c mod 4`. One is being filled, the
  others are complete; a query in cell `c` attends to `c - 2`, and for odd `c` to `c - 3`;
- `r` sums over equal blocks of all tokens so far, from which the first cell of the next level is made when it is full:
  so a level begins when the sequence has outgrown its first cell, and no length need be known in advance.

That is `3r + 4p * ceil(log2(ceil(n / r)))` entries. Complete cells only are attended to, in which every token exists,
so each summary is a plain weighted sum, to which a token is added as it comes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry import cell_side
from .attention import Attention


class Cache:
    """Keys and values of a causal model's earlier tokens, in some form, for each of its layers, all of one kind.

    Rows may differ in length. The layers keep their weights while the cache is in use.

    Raises:
        ValueError: for layers that are not causal, or whose rank does not divide their cell size.
    """

    def __init__(self, attentions: Sequence[Attention]):
        self._rows = Rows()
        self.layers = [(KeyValues if x.kind == "full" else Multipole)(x, self._rows) for x in attentions]

    @property
    def lengths(self) -> Tensor | None:
        """int64 `[B]`, tokens that each row has seen; None before the first ones."""
        return self._rows.lengths

    def entries(self) -> int:
        """Keys that a layer keeps for the longest row; there are as many values."""
        return self.layers[0].entries()

    def steps(self, ids: Tensor, key_mask: Tensor | None) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The parts of ids and mask `[B, N]` that layers take at once: the first tokens together, later ones singly."""
        rows = self._rows
        if rows.lengths is None:
            yield ids, key_mask
            rows.advance(torch.zeros(len(ids), dtype=torch.int64, device=ids.device), ids.shape[1], key_mask)
            return
        if len(ids) != len(rows.lengths):
            raise ValueError(f"the cache is of {len(rows.lengths)} rows, got {len(ids)}")
        for t in range(ids.shape[1]):
            mask = None if key_mask is None else key_mask[:, t : t + 1]
            yield ids[:, t : t + 1], mask
            rows.advance(rows.lengths, 1, mask)


@dataclass
class Rows:
    """How far the rows have come before the tokens at hand, the same for all layers."""

    lengths: Tensor | None = None  # int64 [B]
    longest: int = 0
    plan: Plan | None = None

    def advance(self, lengths: Tensor, tokens: int, key_mask: Tensor | None) -> None:
        """Leave tokens `[B, tokens]` behind, those that exist."""
        self.lengths = lengths + (tokens if key_mask is None else key_mask.sum(1))
        self.longest = self.longest + tokens if key_mask is None else int(self.lengths.max())
        self.plan = None


class LayerCache:
    """What one layer keeps. Its subclasses `fill` it with a row's first tokens, of which `lengths` `[B]` exist, take a
    `step` of one token a row, and tell how many `entries` of a key and a value they hold for the longest row."""

    def __init__(self, layer: Attention, rows: Rows):
        if not layer.causal:
            raise ValueError("a cache is for causal models: in others, later tokens change earlier outputs")
        self.layer, self.rows = layer, rows

    def offset(self) -> Tensor | int:
        """The position of the first of the tokens at hand, `[B, 1]`."""
        return 0 if self.rows.lengths is None else self.rows.lengths[:, None]

    def extend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        """Add tokens `[B, heads, N, head_dim]`, and give what each attends to; see `Cache.steps` for how many."""
        is_first = self.rows.lengths is None
        out = self.layer.attend(q, k, v, key_mask) if is_first else None
        if key_mask is not None:  # what is absent may be kept where the next token will be
            k, v = (torch.where(key_mask[:, None, :, None], x, 0) for x in (k, v))
        with torch.autocast(q.device.type, enabled=False):
            if not is_first:
                return self.step(q, k, v)
            self.fill(k, v, torch.full((len(k),), k.shape[2], device=k.device) if key_mask is None else key_mask.sum(1))
        return out


class KeyValues(LayerCache):
    """Every key and value, `n` entries: for full attention."""

    def entries(self) -> int:
        return self.rows.longest

    def fill(self, k: Tensor, v: Tensor, lengths: Tensor) -> None:
        self.tokens = torch.stack((k, v))  # [2, B, heads, room, head_dim]

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        lengths, count = self.rows.lengths, self.rows.longest + 1
        if count > self.tokens.shape[3]:
            self.tokens = F.pad(self.tokens, (0, 0, 0, count))
        row = torch.arange(len(q), device=q.device)
        self.tokens[:, row, :, lengths] = torch.stack((k, v))[:, :, :, 0].movedim(0, 1)
        keys, values = self.tokens[:, :, :, :count]
        seen = torch.arange(count, device=q.device) <= lengths[:, None]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None])


class Plan(NamedTuple):
    """Where the next token of each row goes, and what it attends to; levels are counted from 0 here."""

    near: Tensor  # [B, 1], the slot of its key and value
    block: Tensor  # [B, 1], its block
    far: Tensor  # [B, levels * rank], the slots of the summaries that it is a part of
    begun: Tensor  # [B, levels * rank, 1, 1, 1], whether these hold earlier tokens of the same cell
    bin: Tensor  # [B, levels], of the kernel
    side: Tensor  # [levels, 1, 1, 1, 1], tokens of a cell
    bias: Tensor  # [B, 1, 1, slots], added to scores: -inf, 0, or the log of the tokens that a summary speaks for


class Multipole(LayerCache):
    """Near tokens, and, but for `local`, summary tokens of all levels; see the top of this file.

    `slots` is `[B, slots, key | value, heads, head_dim]`, `blocks` the same with `cell_size` sums over blocks.
    """

    def __init__(self, layer: Attention, rows: Rows):
        super().__init__(layer, rows)
        self.cell_size, self.rank, self.levels, self.kernels = layer.cell_size, layer.rank, 0, None
        if layer.kind == "local":
            return
        if self.cell_size % self.rank:
            raise ValueError(f"a cache needs a rank that divides cell_size {self.cell_size}, got {self.rank}")
        if layer.kernels is not None:  # densities [levels, kinds, 1, rank, heads | 1, head_dim, cell_size]
            self.kernels = layer.kernels.detach()[:, :, 0].permute(0, 5, 2, 1, 3, 4)
        else:  # the sub-cell means
            start = torch.eye(self.rank, device=layer.qkv.weight.device).mul(self.rank)
            start = start.repeat_interleave(self.cell_size // self.rank, 0)
            self.kernels = start[None, :, :, None, None, None]
        # By level and bin: `[levels, bins, rank, key | value | 1, heads | 1, head_dim | 1]`.

    def entries(self) -> int:
        return self.slots.shape[1] + (0 if self.kernels is None else self.cell_size)

    def fill(self, k: Tensor, v: Tensor, lengths: Tensor) -> None:
        longest = max(1, int(lengths.max()))
        tokens = _joined(k, v)[:, :longest]
        self.slots = _latest(tokens, lengths - 1, 2 * self.cell_size)
        if self.kernels is not None:
            self.kernels = self.kernels.to(tokens.dtype)
            self.blocks = _whole(tokens, self.cell_size)
            while longest > cell_side(self.levels + 1, self.cell_size):
                self._begin_level(lengths)

    def _begin_level(self, lengths: Tensor) -> None:
        """Begin the next level, with all of its cells that rows of these lengths have."""
        self.levels += 1
        side = cell_side(self.levels, self.cell_size)
        cells = self.blocks.unflatten(1, (-1, self.cell_size))
        weights = self.kernels[min(self.levels, len(self.kernels)) - 1] / side
        summaries = torch.einsum("bcrxhd,rpxhd->bcpxhd", cells, weights)
        self.slots = torch.cat((self.slots, _latest(summaries, lengths // side, 4).flatten(1, 2)), 1)
        self.blocks = _whole(_whole(self.blocks, 2).unflatten(1, (-1, 2)).sum(2), self.cell_size)

    def step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kernels is not None and self.rows.longest >= cell_side(self.levels + 1, self.cell_size):
            self._begin_level(self.rows.lengths)
        if self.rows.plan is None:
            self.rows.plan = self._plan(self.rows.lengths[:, None])
        plan, token = self.rows.plan, _joined(k, v)
        row = torch.arange(len(q), device=q.device)[:, None]
        self.slots[row, plan.near] = token
        if self.kernels is not None:
            self.blocks[row, plan.block] += token
            level = torch.arange(self.levels, device=q.device).clamp(max=len(self.kernels) - 1)
            weights = self.kernels[level, plan.bin] / plan.side
            before = torch.where(plan.begun, self.slots[row, plan.far], 0)
            self.slots[row, plan.far] = before + weights.flatten(1, 2) * token
        keys, values = self.slots.permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q.to(keys.dtype), keys, values, attn_mask=plan.bias).to(q.dtype)

    def _plan(self, token: Tensor) -> Plan:
        """The plan for tokens of the numbers `[B, 1]`."""
        size, rank, device, dtype = self.cell_size, self.rank, token.device, self.slots.dtype
        near, level = 2 * size, torch.arange(self.levels, device=device)
        held = token - (token - torch.arange(near, device=device)) % near
        seen = held >= (token // size - 1).clamp(min=0) * size

        # Of each row and level `[B, levels]`; of each of the cells that are kept `[B, levels, 4]`.
        side = size << level
        cell, offset = token // side, token % side
        first = (cell // 2 * 2 - 2)[..., None]  # of the children of the parent's left neighbour
        held = first + (torch.arange(4, device=device) - first) % 4
        attended = (first >= 0) & (held <= cell[..., None] - 2)
        count = (side.to(dtype) / rank).log() if self.layer.count_bias else torch.zeros_like(side, dtype=dtype)
        seen = torch.cat((seen, attended.flatten(1).repeat_interleave(rank, 1)), 1)
        bias = F.pad(count.repeat_interleave(4 * rank), (near, 0)).expand_as(seen).masked_fill(~seen, -torch.inf)
        slot = near + (4 * level + cell % 4)[..., None] * rank + torch.arange(rank, device=device)
        return Plan(
            near=token % near,
            block=token >> self.levels,
            far=slot.flatten(1),
            begun=(offset > 0).repeat_interleave(rank, 1)[..., None, None, None],
            bin=offset >> level,
            side=side[:, None, None, None, None],
            bias=bias[:, None, None],
        )


def _joined(k: Tensor, v: Tensor) -> Tensor:
    """`[B, N, 2, heads, head_dim]` in float32 or wider, from two of `[B, heads, N, head_dim]`."""
    return torch.stack((k, v), 1).movedim(3, 1).to(torch.promote_types(k.dtype, torch.float32))


def _latest(x: Tensor, last: Tensor, slots: int) -> Tensor:
    """The last ones of `[B, N, ...]` up to number `last` `[B]`, number `i` in slot `i mod slots`."""
    slot = torch.arange(slots, device=x.device)
    number = last[:, None] - (last[:, None] - slot) % slots
    return x[torch.arange(len(x), device=x.device)[:, None], number.clamp(0, x.shape[1] - 1)]


def _whole(x: Tensor, size: int) -> Tensor:
    """`[B, N, 2, heads, head_dim]`, N filled up with zeros to a multiple of `size`."""
    return F.pad(x, (0, 0, 0, 0, 0, 0, 0, -x.shape[1] % size))
