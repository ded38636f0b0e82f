"""The definition, dense and slow: every backend is held to this one.

It shares the integers of `geometry` and the start value with the others and nothing else: relations between tokens and
cells are full matrices, kernels act token by token through one matrix an axis, and one softmax runs over all entries of
the cover. Differentiable to any order, float16 to float64, any device; memory grows with the square of the number of
tokens.
"""

import torch
from torch import Tensor

from ..geometry import cell_side, num_cells, num_levels, subcell_overlaps, subcells, tiling
from ..kernels import level_kernels, start_kernels
from .call import Call, Options

LETTERS = "xyz"
TOKENS = "ijl"


def attention(call: Call) -> tuple[Tensor, Tensor]:
    """`(out, lse)`: out `[B, heads, *grid, head_dim]` in q's dtype, lse `[B, heads, *grid]` in float32 or wider."""
    probabilities, values, lse, exists = _cover(call)
    out = sum(p @ x for p, x in zip(probabilities, values, strict=True))
    # Kernels of levels that the grid does not use take part too: their gradient is zero, not None.
    for stack in call.kernels:
        out = out + stack.flatten()[:0].sum().to(out.dtype)
    out = torch.where(exists[..., None], out, 0)
    grid = call.q.shape[2:-1]
    return out.unflatten(2, grid).to(call.q.dtype), lse.unflatten(2, grid)


def attention_map(call: Call) -> Tensor:
    """`[B, heads, *grid (query), *grid (key)]`: how much each query attends to each token; rows sum to 1.

    Near probabilities as they are, that of a summary token spread over its existing tokens by their overlap with the
    sub-cell. Values play no part.
    """
    probabilities, _, _, exists = _cover(call)
    grid, total = call.q.shape[2:-1], probabilities[0]
    tokens_exist = _tokens_exist(call.q, call.key_mask, total.dtype)
    for level, p in enumerate(probabilities[1:], 1):
        share = _overlap_matrix(grid, level, call.options, total) * tokens_exist[:, None]
        count = share.sum(-1, keepdim=True)
        total = total + p @ (share / torch.where(count > 0, count, 1))[:, None]
    return torch.where(exists[..., None], total, 0).unflatten(3, grid).unflatten(2, grid)


def _cover(call: Call) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
    """Lists over the near field and the levels: probabilities `[B, heads, n, entries]`, values; lse; existence."""
    q, k, v, stacks, key_mask, options = call
    grid = q.shape[2:-1]
    dtype = torch.promote_types(q.dtype, torch.float32)
    if key_mask is not None:
        q, k, v = (torch.where(key_mask[:, None, ..., None], x, 0) for x in (q, k, v))
    q, k, v = (x.to(dtype) for x in (q, k, v))
    tokens_exist = _tokens_exist(q, key_mask, torch.bool)

    near, _ = _relation(grid, 0, options, q.device)
    queries, values = q.flatten(2, -2), [v.flatten(2, -2)]
    scores = [queries @ k.flatten(2, -2).mT * options.scale]
    scores[0] = scores[0].masked_fill(~(near & tokens_exist[:, None, None]), -torch.inf)
    for level in range(1, num_levels(grid, options.cell_size) + 1):
        count = _overlap_matrix(grid, level, options, q) @ tokens_exist.to(dtype)[:, :, None] / options.rank
        kernels = level_kernels(stacks, level)
        if kernels is None:
            sizes = (level, options.cell_size, options.rank, len(grid), 1, 1)
            kernels = start_kernels(*sizes, variant=options.variant, device=q.device)
        kernels = kernels.to(dtype)
        keys = _summaries(k, kernels[0], level, tokens_exist, count, options)
        values.append(_summaries(v, kernels[1], level, tokens_exist, count, options))
        if options.variant == "linear":
            own_subcell = _relation(grid, level, options, q.device)[1]
            queries = _summaries(q, kernels[2], level, tokens_exist, count, options)[:, :, own_subcell]
        attended = _relation(grid, level, options, q.device)[0] & (count[:, None, None, :, 0] > 0)
        score = queries @ keys.mT * options.scale
        if options.count_bias:
            score = score + torch.where(count > 0, count, 1).log()[:, None].mT
        scores.append(score.masked_fill(~attended, -torch.inf))

    exists = tokens_exist[:, None].expand(q.shape[0], q.shape[1], -1)
    score = torch.where(exists[..., None], torch.cat(scores, -1), 0)
    lse = torch.where(exists, score.logsumexp(-1), -torch.inf)
    probabilities = score.softmax(-1).split([s.shape[-1] for s in scores], -1)
    return probabilities, values, lse, exists


def _tokens_exist(q: Tensor, key_mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`[B, n]`."""
    mask = torch.ones(q.shape[0], *q.shape[2:-1], device=q.device) if key_mask is None else key_mask
    return mask.flatten(1).to(dtype)


def _relation(grid, level: int, options: Options, device) -> tuple[Tensor, Tensor]:
    """Which entries of a level each token attends to, `[n, entries]`, and each token's own summary token, `[n]`.

    Entries are tokens at level 0, else summary tokens ordered by cell, then by sub-cell.
    """
    side = cell_side(level, options.cell_size)
    token = torch.cartesian_prod(*[torch.arange(n, device=device) for n in grid]).reshape(-1, len(grid))
    own = token // side
    if level == 0:
        distance = (own[:, None] - own[None]).abs().amax(-1)
        attended = distance <= 1
        if options.causal:
            attended &= token[:, None, 0] >= token[None, :, 0]
        return attended, torch.arange(len(token), device=device)
    cells = num_cells(grid, side)
    cell = torch.cartesian_prod(*[torch.arange(c, device=device) for c in cells]).reshape(-1, len(grid))
    attended = ((own[:, None] - cell[None]).abs().amax(-1) > 1) & (
        (own[:, None] // 2 - cell[None] // 2).abs().amax(-1) <= 1
    )
    if options.causal:
        attended &= cell[None, :, 0] < own[:, None, 0]
    parts = tiling(options.rank, len(grid))
    own_cell = own_part = torch.zeros(len(token), dtype=torch.long, device=device)
    for axis, (extent, c, p) in enumerate(zip(grid, cells, parts, strict=True)):
        part = torch.tensor(subcells(extent, side, p), device=device)[token[:, axis]] % p
        own_cell, own_part = own_cell * c + own[:, axis], own_part * p + part
    return attended.repeat_interleave(options.rank, 1), own_cell * options.rank + own_part


def _overlap_matrix(grid, level: int, options: Options, like: Tensor) -> Tensor:
    """`[entries, n]`: overlap of each token with each summary token's sub-cell, in units of `1 / rank` tokens."""
    side = cell_side(level, options.cell_size)
    parts = tiling(options.rank, len(grid))
    matrix = torch.ones(1, options.rank, *(1,) * len(grid), dtype=like.dtype, device=like.device)
    index = torch.cartesian_prod(*[torch.arange(p, device=like.device) for p in parts]).reshape(options.rank, -1)
    for axis, (extent, p) in enumerate(zip(grid, parts, strict=True)):
        overlaps = torch.tensor(subcell_overlaps(side, p), dtype=like.dtype, device=like.device)[index[:, axis]]
        matrix = _outer(matrix, _token_matrix(overlaps, extent, side), axis, len(grid))
    return matrix.flatten(2).flatten(0, 1)


def _outer(matrix: Tensor, axis_matrix: Tensor, axis: int, ndim: int) -> Tensor:
    """Multiply `[cells so far, p, *tokens]` by an axis' `[p, cells, extent]`, its cells becoming the fastest."""
    p, cells, extent = axis_matrix.shape
    shape = [1] * ndim
    shape[axis] = extent
    factor = axis_matrix.transpose(0, 1).reshape(1, cells, p, *shape)
    return (matrix[:, None] * factor).flatten(0, 1)


def _token_matrix(weights: Tensor, extent: int, side: int) -> Tensor:
    """Lay weights over the offsets of a cell, `[..., side]`, out along an axis: `[..., cells, extent]`."""
    token = torch.arange(extent, device=weights.device)
    cell = torch.arange(-(-extent // side), device=weights.device)
    return torch.where(token // side == cell[:, None], weights[..., token % side].unsqueeze(-2), 0)


def _summaries(x: Tensor, kernels: Tensor, level: int, tokens_exist: Tensor, count: Tensor, options: Options) -> Tensor:
    """Summary tokens of a level from tokens `[B, heads, *grid, head_dim]`: `[B, heads, entries, head_dim]`.

    `kernels`: of one kind, `[axes, rank, heads | 1, head_dim | 1, bins]`.
    Those of no token, by `count` `[B, entries, 1]`, are 0 in a cut cell, whatever their kernels hold.
    """
    grid, side = x.shape[2:-1], cell_side(level, options.cell_size)
    offset = torch.arange(side, device=x.device)
    weights = kernels[..., offset * kernels.shape[-1] // side] / side
    matrices = [_token_matrix(w, n, side) for w, n in zip(weights, grid, strict=True)]
    cells, tokens = LETTERS[: len(grid)], TOKENS[: len(grid)]

    def contract(matrices, y):
        terms = ",".join(f"phc{a}{i}" for a, i in zip(cells, tokens, strict=True))
        matrices = [m.expand(-1, y.shape[1], y.shape[-1], -1, -1) for m in matrices]
        return torch.einsum(f"{terms},bh{tokens}c->bh{cells}pc", *matrices, y).flatten(2, -2)

    summary = contract(matrices, x)
    exist = tokens_exist.to(x.dtype).unflatten(1, grid)[:, None, ..., None].expand(-1, x.shape[1], *grid, x.shape[-1])
    left = contract([m.abs() for m in matrices], exist)
    whole = torch.ones((), dtype=x.dtype, device=x.device)
    for w in weights:
        whole = whole * w.abs().sum(-1)
    whole = whole.expand(-1, x.shape[1], x.shape[-1]).transpose(0, 1).repeat(1, left.shape[2] // options.rank, 1)
    # The ratio of sums first: a cut cell may be left with weights whose square underflows in a gradient.
    present = (left > 0) & (count[:, None] > 0)
    scaled = torch.where(present, summary / torch.where(present, left, 1) * whole, 0)
    full = contract([_token_matrix(torch.ones_like(w), n, side) for w, n in zip(weights, grid, strict=True)], exist)
    return torch.where(full == side ** len(grid), summary, scaled)
