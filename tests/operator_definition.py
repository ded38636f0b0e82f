"""The operator's definition, written a second time.

It follows the specification's text and takes nothing from the library but `cover` and `start_kernels`, which have tests
of their own. It runs in the dtype of q: it is the oracle in float64 and `plain` in every other dtype.
"""

from functools import lru_cache
from itertools import product
from math import prod

import torch

from fma2d import cover, num_levels, start_kernels


@lru_cache(maxsize=64)
def relations(grid, cell_size, causal):
    """`cover` of every token as matrices: `near [n, n]` and, a level each, `far [n, cells]`."""
    tokens = list(product(*map(range, grid)))
    number = {token: i for i, token in enumerate(tokens)}
    near = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    cells = {}
    for level in range(1, num_levels(grid, cell_size) + 1):
        side = cell_size * 2 ** (level - 1)
        cells[level] = {cell: i for i, cell in enumerate(product(*(range(-(-n // side)) for n in grid)))}
    far = {level: torch.zeros(len(tokens), len(c), dtype=torch.bool) for level, c in cells.items()}
    for i, token in enumerate(tokens):
        near_tokens, far_cells = cover(grid, cell_size, token, causal)
        near[i, [number[t] for t in near_tokens]] = True
        for level, cell, _ in far_cells:
            far[level][i, cells[level][cell]] = True
    return near, far


def _tiling(rank, ndim):
    """All ways to write `rank` as `p_1 <= .. <= p_D`, the most equal one."""
    factors = [f for f in range(1, rank + 1) if rank % f == 0]
    ways = [p for p in product(factors, repeat=ndim) if prod(p) == rank and list(p) == sorted(p)]
    return min(ways, key=lambda p: p[-1] - p[0])


def definition(q, k, v, kernels, *, cell_size, rank, variant, causal, key_mask, count_bias, scale):
    """`(out, lse)` in q's dtype, dense, from the specification's text."""
    batch, _, *grid, head_dim = q.shape
    ndim, parts = len(grid), _tiling(rank, len(grid))
    scale = head_dim**-0.5 if scale is None else scale
    exists = torch.ones(batch, *grid, dtype=torch.bool) if key_mask is None else key_mask.expand(batch, *grid)
    q, k, v = (torch.where(exists[:, None, ..., None], x, 0).flatten(2, -2) for x in (q, k, v))
    exists = exists.flatten(1)
    position = torch.tensor(list(product(*map(range, grid)))).T  # [D, n]
    subcell = torch.tensor(list(product(*map(range, parts)))).T  # [D, p]
    near, far = relations(tuple(grid), cell_size, causal)

    def summarise(x, kind, level):  # x [B, heads, n, head_dim] -> [B, cells, p, heads, head_dim]
        side = cell_size * 2 ** (level - 1)
        learned = 0 if kernels is None else len(kernels)
        if learned:
            density = kernels[min(level, learned) - 1]
        else:
            density = start_kernels(level, cell_size, rank, ndim, 1, 1, variant=variant, dtype=torch.float64)
        weight, whole = 1, 1  # of every token [p, heads, head_dim, n]; sum over a full cell [p, heads, head_dim]
        for axis, w in enumerate(density[kind]):
            w = w.to(torch.promote_types(x.dtype, torch.float32)) / side
            bins = w.shape[-1]
            weight = weight * w[..., position[axis] % side * bins // side]
            whole = whole * w[..., torch.arange(side) * bins // side].abs().sum(-1)
        member = _members(position, grid, side)  # [cells, n]
        existing = member * exists[:, None]  # [B, cells, n]
        left = torch.einsum("bzn,phcn->bzphc", existing.to(weight.dtype), weight.abs())
        total = torch.einsum("zn,bphcn->bzphc", member.to(x.dtype), weight.to(x.dtype) * x.mT[:, None])
        full = existing.sum(-1) == side**ndim
        factor = torch.where(left > 0, whole / torch.where(left > 0, left, 1), 0)
        return total * torch.where(full[..., None, None, None], 1, factor).to(x.dtype)

    scores = [(q @ k.mT * scale).masked_fill(~(near & exists[:, None, None]), -torch.inf)]
    values = [v]
    for level, attended in far.items():
        side = cell_size * 2 ** (level - 1)
        count = exists[:, None].long()  # every token's share in every sub-cell, in units of 1 / rank: [B, p, n]
        for axis, part in enumerate(subcell):
            count = count * _overlap(position[axis] % side, part, parts[axis], side)
        count = torch.einsum("zn,bpn->bzp", _members(position, grid, side), count)
        keys, vals = summarise(k, 0, level), summarise(v, 1, level)
        queries = q.transpose(1, 2)  # [B, n, heads, head_dim]
        if variant == "linear":
            own_cell = _members(position, grid, side).argmax(0)
            own_part = torch.zeros_like(own_cell)
            for axis, p in enumerate(parts):
                own_part = own_part * p + (2 * (position[axis] % side) + 1) * p // (2 * side)
            queries = summarise(q, 2, level)[:, own_cell, own_part]
        score = torch.einsum("bnhc,bzphc->bhnzp", queries, keys) * scale
        if count_bias:
            score = score + (count.clamp(min=1).double() / rank).log().to(q.dtype)[:, None, None]
        seen = attended[None, :, :, None] & (count > 0)[:, None]  # [B, n, cells, p]
        scores.append(score.masked_fill(~seen[:, None], -torch.inf).flatten(3))
        values.append(vals.permute(0, 3, 1, 2, 4).flatten(2, 3))
    score = torch.where(exists[:, None, :, None], torch.cat(scores, -1), 0)
    out = torch.where(exists[:, None, :, None], score.softmax(-1) @ torch.cat(values, 2), 0)
    lse = torch.where(exists[:, None], score.logsumexp(-1), -torch.inf)
    return out.unflatten(2, grid), lse.unflatten(2, grid)


def _members(position, grid, side):
    """Which cell holds each token: `[cells, n]` of 0 and 1."""
    cell = torch.zeros(position.shape[1], dtype=torch.long)
    for axis, extent in enumerate(grid):
        cell = cell * -(-extent // side) + position[axis] // side
    return (cell == torch.arange(prod(-(-extent // side) for extent in grid))[:, None]).long()


def _overlap(offset, part, parts, side):
    """`[part, offset]`: length of `[offset, offset + 1)` within sub-interval `part` of `parts`, times `parts`."""
    start = torch.maximum(offset * parts, part[:, None] * side)
    stop = torch.minimum((offset + 1) * parts, (part[:, None] + 1) * side)
    return (stop - start).clamp(min=0)
