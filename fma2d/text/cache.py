"""What a causal attention layer keeps of earlier tokens, so that the next one costs little.

A `MultipoleCache` keeps what later queries can still attend to, and what is needed to go on. In units of one key and
one value, a row of `n` tokens has, with cell size `r` and rank `p`,

- `2r` near tokens: those of the last two base cells, token `t` in slot `t mod 2r`;
- `4p` summary tokens for each level: those of the last four cells, cell `c` in slot `c mod 4`. One is being filled, the
  others are complete; a query in cell `c` attends to `c - 2`, and for odd `c` to `c - 3`;
- `r` sums over equal blocks of all tokens so far, from which the first cell of the next level is made when it is full:
  so a level begins when the sequence has outgrown its first cell, and no length need be known in advance.

That is `3r + 4p * ceil(log2(ceil(n / r)))` entries. Complete cells only are attended to, in which every token exists,
so each summary is a plain weighted sum, to which a token is added as it comes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels import start_kernels
from ..geometry import cell_side
from ..modules import FMA1d
from .checks import check_padding

Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


class Cache(ABC):
    """Keys and values of one layer's tokens in some form; rows may be of different length.

    Attributes:
        lengths: int64 `[B]`, tokens that each row has seen; None before the first call.
        longest: the most of them.
    """

    lengths: Tensor | None = None
    longest: int = 0

    @torch.no_grad()
    def extend(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, attend: Attend) -> Tensor:
        """Add tokens, and give what each attends to, `[B, heads, N, head_dim]`; no gradients.

        Args:
            q, k, v: `[B, heads, N, head_dim]`.
            key_mask: bool, broadcastable to `[B, N]`, True where a token exists, in each row the first ones.
            attend: the layer's attention without a cache, for the first call.

        Raises:
            ValueError: for another number of rows than before, or a mask with a hole.
        """
        if key_mask is not None:
            key_mask = key_mask.expand(q.shape[0], q.shape[2])
            check_padding(key_mask)
        if self.lengths is None:
            out = attend(q, k, v, key_mask)
            if key_mask is None:
                self.lengths = torch.full((q.shape[0],), q.shape[2], device=q.device)
                self.longest = q.shape[2]
            else:
                self.lengths = key_mask.sum(1)
                self.longest = int(self.lengths.max())
            with torch.autocast(q.device.type, enabled=False):
                self._fill(k, v)
            return out
        if q.shape[0] != len(self.lengths):
            raise ValueError(f"the cache is of {len(self.lengths)} rows, got {q.shape[0]}")
        if key_mask is not None:
            k, v = (torch.where(key_mask[:, None, :, None], x, 0) for x in (k, v))
        outs = []
        for t in range(q.shape[2]):
            with torch.autocast(q.device.type, enabled=False):
                outs.append(self._step(*(x[:, :, t : t + 1] for x in (q, k, v))))
            self.lengths = self.lengths + (1 if key_mask is None else key_mask[:, t])
            self.longest = self.longest + 1 if key_mask is None else int(self.lengths.max())
        return torch.cat([q[:, :, :0], *outs], 2)

    @abstractmethod
    def entries(self) -> int:
        """Keys that are kept for the longest row; there are as many values."""

    @abstractmethod
    def _fill(self, k: Tensor, v: Tensor) -> None:
        """Take the first tokens, of which `lengths` exist in each row."""

    @abstractmethod
    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Take one token a row, and attend; an absent token (zeros) may be kept where the next one will be."""


class KeyValueCache(Cache):
    """Every key and value: `n` entries, for full attention."""

    def entries(self) -> int:
        return self.longest

    def _fill(self, k: Tensor, v: Tensor) -> None:
        self.tokens = torch.stack((k, v))

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.longest >= self.tokens.shape[3]:
            self.tokens = F.pad(self.tokens, (0, 0, 0, self.tokens.shape[3] + 1))
        rows = torch.arange(len(q), device=q.device)
        self.tokens[:, rows, :, self.lengths] = torch.stack((k, v))[:, :, :, 0].movedim(0, 1)
        keys, values = self.tokens[:, :, :, : self.longest + 1]
        seen = torch.arange(self.longest + 1, device=q.device) <= self.lengths[:, None]
        return F.scaled_dot_product_attention(q, keys, values, attn_mask=seen[:, None, None])


class MultipoleCache(Cache):
    """Near tokens, and, with kernels, summary tokens of all levels; see the top of this file.

    Args:
        cell_size: tokens of a base cell.
        rank: summary tokens per coarse cell, a divisor of `cell_size`.
        kernels: densities as `FMA1d` holds them, `[levels, key | value, 1, rank, heads | 1, head_dim | 1, cell_size]`
            with at least one level; None for the near field alone.
        count_bias: whether a summary token counts for as many as it stands for.
    """

    def __init__(self, cell_size: int, rank: int = 1, kernels: Tensor | None = None, count_bias: bool = True):
        self.cell_size, self.rank = cell_size, rank
        self.levels = 0
        self.planner = Planner(cell_size, rank, kernels is not None, count_bias)
        # By level and bin: `[levels, bins, key | value, heads | 1, rank, head_dim | 1]`.
        self.kernels = None if kernels is None else kernels.detach()[:, :, 0].permute(0, 5, 1, 3, 2, 4)

    @classmethod
    def of(cls, module: FMA1d) -> MultipoleCache:
        """An empty cache for a module, to be used while its kernels stay as they are.

        Raises:
            ValueError: for a module that is not causal, or whose rank does not divide its cell size.
        """
        if not module.causal:
            raise ValueError("a cache is for causal modules: in others, later tokens change earlier outputs")
        if module.cell_size % module.rank:
            raise ValueError(f"a cache needs a rank that divides cell_size {module.cell_size}, got {module.rank}")
        kernels = module.kernels
        if kernels is None:
            sizes = (1, module.cell_size, module.rank, 1, 1, 1)
            kernels = start_kernels(*sizes, bins=module.cell_size, device=module.qkv.weight.device)[None]
        return cls(module.cell_size, module.rank, kernels, module.count_bias)

    def share_plan(self, other: MultipoleCache) -> None:
        """Plan each step once for both: for the cache of another layer that is given the same tokens."""
        if self.planner == other.planner:
            self.planner = other.planner

    def entries(self) -> int:
        return self.slots.shape[3]

    @property
    def _blocks(self) -> int:
        """How many of the slots, the first ones, hold sums over blocks: no query attends to them."""
        return 0 if self.kernels is None else self.cell_size

    def _fill(self, k: Tensor, v: Tensor) -> None:
        dtype = torch.promote_types(k.dtype, torch.float32)
        blocks = torch.stack((k, v))[:, :, :, : max(1, self.longest)].to(dtype)
        exists = torch.arange(blocks.shape[3], device=k.device) < self.lengths[:, None]
        blocks = torch.where(exists[:, None, :, None], blocks, 0)
        slots = [_latest(blocks, self.lengths - 1, 2 * self.cell_size)]
        if self.kernels is not None:
            self.kernels = self.kernels.to(dtype)
            while self.longest > cell_side(self.levels + 1, self.cell_size):
                self.levels += 1
                own = self.lengths // cell_side(self.levels, self.cell_size)
                summaries = _latest(self._summaries(blocks).flatten(4), own, 4)
                slots.append(summaries.unflatten(4, (self.rank, -1)).flatten(3, 4))
                blocks = _pairs(blocks)
            slots.insert(0, _whole(blocks, self.cell_size))
        self.slots = torch.cat(slots, 3)

    def _summaries(self, blocks: Tensor) -> Tensor:
        """`[2, B, heads, cells, rank, head_dim]` of the last level, whose cells have `cell_size` blocks each."""
        cells = _whole(blocks, self.cell_size).unflatten(3, (-1, self.cell_size))
        weights = self.kernels[min(self.levels, len(self.kernels)) - 1] / cell_side(self.levels, self.cell_size)
        return torch.einsum("xbhcrd,rxhpd->xbhcpd", cells, weights)

    def _begin_level(self) -> None:
        """Begin the next level: all tokens are in its first cell, which the longest row has filled."""
        blocks, slots = self.slots.split((self.cell_size, self.slots.shape[3] - self.cell_size), 3)
        self.levels += 1
        first = _whole(self._summaries(blocks).flatten(3, 4), 4 * self.rank)
        self.slots = torch.cat((_whole(_pairs(blocks), self.cell_size), slots, first), 3)

    def _step(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.kernels is not None and self.longest >= cell_side(self.levels + 1, self.cell_size):
            self._begin_level()
        dtype = self.slots.dtype
        plan = self.planner.plan(self.lengths, self.levels, dtype)
        token = torch.stack((k, v)).to(dtype)
        self._put(plan.near, token)
        if self.kernels is not None:
            self._put(plan.block, self._get(plan.block) + token)
            # `[B, levels, key | value, heads | 1, rank, head_dim | 1]`, then in the order of slots.
            weights = self.kernels[plan.level.clamp(max=len(self.kernels) - 1), plan.bin] * plan.density
            weights = weights.permute(2, 0, 3, 1, 4, 5).flatten(3, 4)
            self._put(plan.far, torch.where(plan.begun, self._get(plan.far), 0) + weights * token)
        keys, values = self.slots[:, :, :, self._blocks :]
        return F.scaled_dot_product_attention(q.to(dtype), keys, values, attn_mask=plan.bias).to(q.dtype)

    def _at(self, slot: Tensor) -> Tensor:
        return slot[:, None, :, None].expand(2, -1, self.slots.shape[2], -1, self.slots.shape[4])

    def _get(self, slot: Tensor) -> Tensor:
        """What is in slots `[B, S]`: `[2, B, heads, S, head_dim]`."""
        return self.slots.gather(3, self._at(slot))

    def _put(self, slot: Tensor, x: Tensor) -> None:
        self.slots.scatter_(3, self._at(slot), x)


class Plan(NamedTuple):
    """Where the next token of each row goes, and what it attends to."""

    near: Tensor  # [B, 1], the slot of its key and value
    block: Tensor  # [B, 1], the slot of its block
    far: Tensor  # [B, levels * rank], the slots of the summaries that it is a part of
    begun: Tensor  # [B, 1, levels * rank, 1], whether these hold earlier tokens of the same cell
    level: Tensor  # [levels], 0 for level 1
    bin: Tensor  # [B, levels], of the kernel
    density: Tensor  # [levels, 1, 1, 1, 1], what kernels as modules hold them are multiplied by
    bias: Tensor  # [B, 1, 1, slots], added to scores: -inf, 0, or the log of the tokens that a summary speaks for


@dataclass
class Planner:
    """Makes plans, and keeps the last one for the other layers of the model, which are at the same tokens."""

    cell_size: int
    rank: int
    far: bool
    count_bias: bool
    _made: tuple[Tensor, int, torch.dtype, Plan] | None = field(default=None, compare=False)

    def plan(self, lengths: Tensor, levels: int, dtype: torch.dtype) -> Plan:
        """The plan for rows that have `lengths` `[B]` tokens."""
        if self._made is not None:
            made_for, *settings, plan = self._made
            if settings == [levels, dtype] and (lengths is made_for or torch.equal(lengths, made_for)):
                return plan
        plan = self._plan(lengths[:, None], torch.arange(levels, device=lengths.device), dtype)
        self._made = lengths, levels, dtype, plan
        return plan

    def _plan(self, token: Tensor, level: Tensor, dtype: torch.dtype) -> Plan:
        size, rank, device = self.cell_size, self.rank, token.device
        near = 2 * size
        held = token - (token - torch.arange(near, device=device)) % near
        seen = held >= (token // size - 1).clamp(min=0) * size

        # Of each row and level `[B, levels]`; of each of the cells that are kept `[B, levels, 4]`.
        side = size << level
        cell, offset = token // side, token % side
        first = (cell // 2 * 2 - 2)[..., None]  # of the children of the parent's left neighbour
        held = first + (torch.arange(4, device=device) - first) % 4
        attended = (first >= 0) & (held <= cell[..., None] - 2)
        count = (side.to(dtype) / rank).log() if self.count_bias else torch.zeros_like(side, dtype=dtype)
        bias = count[:, None].expand_as(attended)
        bias = F.pad(bias.flatten(1).repeat_interleave(rank, 1), (near, 0))
        seen = torch.cat((seen, attended.flatten(1).repeat_interleave(rank, 1)), 1)

        slot = 3 * size + (4 * level + cell % 4)[..., None] * rank + torch.arange(rank, device=device)
        return Plan(
            near=token % near + (size if self.far else 0),
            block=token >> len(level),
            far=slot.flatten(1),
            begun=(offset > 0).repeat_interleave(rank, 1)[:, None, :, None],
            level=level,
            bin=offset >> level,
            density=(1 / side.to(dtype))[:, None, None, None, None],
            bias=bias.masked_fill(~seen, -torch.inf)[:, None, None],
        )


def _latest(x: Tensor, last: Tensor, slots: int) -> Tensor:
    """The last ones of `[2, B, heads, N, C]` up to `last` `[B]`, number `i` in slot `i mod slots`."""
    slot = torch.arange(slots, device=x.device)
    index = last[:, None] - (last[:, None] - slot) % slots
    index = index.clamp(0, x.shape[3] - 1)[:, None, :, None]
    return x.gather(3, index.expand(2, -1, x.shape[2], -1, x.shape[4]))


def _whole(x: Tensor, size: int) -> Tensor:
    """`[2, B, heads, N, C]`, N filled up with zeros to a multiple of `size`."""
    return F.pad(x, (0, 0, 0, -x.shape[3] % size))


def _pairs(x: Tensor) -> Tensor:
    """`[2, B, heads, N, C]`, summed in pairs along N."""
    return _whole(x, 2).unflatten(3, (-1, 2)).sum(4)
