"""The operator on images in standard operations, for exporters: few of them, in large pieces.

Rows of tokens and of summary tokens are gathered by tables (`portable_tables`); then one product makes the near field
of all cells, and one the far field of all levels. What is added to a score for its key's sake rides on further
channels: the key holds it, and the query holds 1 there (or, where not all queries see it alike, 0).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..geometry import cell_side, num_levels
from ..kernels import start_kernels
from .portable_tables import Grid, Tables


def attention(
    qkv: Tensor,
    kernels: Sequence[Tensor],
    *,
    heads: int,
    levels: int,
    cell_size: int,
    rank: int,
    variant: str,
    count_bias: bool = True,
) -> Tensor:
    """`fma2d.multipole_attention` of images without a mask, on what one projection gives.

    Height and width are fixed in what is exported if they are integers, as in torch.export. They stay open under
    TorchScript's tracer, where they are tensors.

    Args:
        qkv: queries, keys and values of all heads, `[B, H, W, 3 * heads * head_dim]`.
        kernels: stacks `[levels_i, kinds, 2, rank, heads | 1, head_dim | 1, bins_i]`, the finest level first; `[]` is
            the start value.
        heads: how many.
        levels: the most levels that a grid may have where its size is open; what is fed later is not checked.
        The others as in `fma2d.multipole_attention`; scores must lie above -1e4.

    Returns:
        `[B, H, W, heads * head_dim]`.

    Raises:
        ValueError: for the open sizes of torch.export, whose algebra of sizes takes minutes a layer.
    """
    batch, height, width, _ = qkv.shape
    channels = int(qkv.shape[-1]) // 3  # under torch.jit.trace sizes are tensors
    dtype = torch.promote_types(qkv.dtype, torch.float32)
    x = qkv.to(dtype)
    tokens = x.reshape(batch, -1, 3 * heads, channels // heads).transpose(1, 2)
    q, k, v = tokens.chunk(3, 1)  # [B, heads, tokens, head_dim]
    q = q * (channels // heads) ** -0.5
    grid = Grid(height, width, cell_size, rank, levels, variant == "linear", count_bias, dtype, qkv.device)
    if grid.is_fixed:
        grid = grid._replace(levels=num_levels(grid.extents, cell_size))
    elif not torch.jit.is_tracing():
        raise ValueError(
            "exportable=True does not take open sizes from torch.export: fix the size, or trace (tools/export.py "
            "--max-size, or torch.onnx.export with dynamo=False); without the flag the operator is one node there"
        )
    if grid.levels == 0:
        out = (q @ k.transpose(-1, -2)).softmax(-1) @ v
    else:
        attend = _linear if grid.is_linear else _loglinear
        out = attend(q, k, v, _summaries(x, kernels, grid, heads, channels // heads), grid.tables())
    return out.transpose(1, 2).reshape(batch, height, width, channels).to(qkv.dtype)


def _linear(q: Tensor, k: Tensor, v: Tensor, summaries: Tensor, tables: Tables) -> Tensor:
    channels, rank = int(q.shape[-1]), int(tables.own.shape[-1])
    # Of each parent, its own 4 * rank summary queries and the summary keys and values of its window.
    q_far, k_far, v_far = _rows(summaries, tables.far).chunk(3, 1)
    scores = q_far[:, :, :, 16 * rank : 20 * rank] @ k_far.transpose(-1, -2) + tables.far_bias
    far = _rows((scores.softmax(-1) @ v_far).flatten(2, 3), tables.results)
    lse = _rows(scores.logsumexp(-1, keepdim=True).flatten(2, 3), tables.results)
    # To a token the far results of its sub-cell are further keys.
    q = F.pad(_rows(q, tables.queries), (0, rank)) + F.pad(tables.own, (channels, 0))
    k = torch.cat((F.pad(k, (0, rank)), F.pad(lse + tables.bias, (channels, 0))), 2)
    return _near(q, k, torch.cat((v, far), 2), tables)


def _loglinear(q: Tensor, k: Tensor, v: Tensor, summaries: Tensor, tables: Tables) -> Tensor:
    k_far, v_far = summaries.chunk(2, 1)
    q = F.pad(_rows(q, tables.queries), (0, 1), value=1.0)
    k = F.pad(torch.cat((k, k_far), 2), (0, 1, 0, 1)) + F.pad(tables.bias, (int(v.shape[-1]), 0))
    return _near(q, k, F.pad(torch.cat((v, v_far), 2), (0, 0, 0, 1)), tables)


def _near(q: Tensor, k: Tensor, v: Tensor, tables: Tables) -> Tensor:
    """Queries by cell, `[B, heads, N, r * r, C]`, over their rows of keys and values; `[B, heads, H * W, head_dim]`."""
    p = (q @ _rows(k, tables.near).transpose(-1, -2)).softmax(-1)
    return _rows((p @ _rows(v, tables.near)).flatten(2, 3), tables.tokens)


def _rows(x: Tensor, table: Tensor) -> Tensor:
    """Rows of `[B, heads, rows, C]` by a table of any shape: `[B, heads, *table, C]`."""
    rows = x.index_select(2, table.reshape(-1))  # which is one operation everywhere
    return rows if table.dim() == 1 else rows.reshape(*x.shape[:2], -1, *table.shape[1:], x.shape[-1])


def _summaries(x: Tensor, kernels: Sequence[Tensor], grid: Grid, heads: int, channels: int) -> Tensor:
    """Summary tokens of all levels, those of queries scaled: `[B, kinds * heads, R, head_dim]`."""
    weights = _weights(kernels, grid, heads, channels)
    x = x.permute(0, 3, 1, 2)
    if not grid.is_linear:
        x = x[:, heads * channels :]
    exist, (height, width) = None, (padded - n for padded, n in zip(grid.padded, grid.extents, strict=True))
    if not grid.is_fixed or height or width:
        exist = F.pad(torch.ones_like(x[:1, :1]), (0, width, 0, height))
        x = F.pad(x, (0, width, 0, height))
    cells, block = [], 1
    for level, weight in enumerate(weights, 1):
        bins, side = int(weight.shape[-1]), cell_side(level, grid.cell_size)
        factor, block = side // bins // block, side // bins
        if factor > 1:
            x = _means(x, factor)
            exist = None if exist is None else _means(exist, factor)
        found = F.conv2d(x, weight, stride=bins, groups=int(x.shape[1]))
        if exist is not None:
            size = weight.abs()
            left = F.conv2d(exist, size, stride=bins).clamp(min=torch.finfo(x.dtype).tiny)
            found = found * (size.sum((1, 2, 3))[:, None, None] / left)
        cells.append(found.flatten(2))
    summaries = torch.cat(cells, 2) if len(cells) > 1 else cells[0]
    return summaries.reshape(x.shape[0], int(x.shape[1]) // channels, channels, -1).transpose(-1, -2)


def _means(x: Tensor, factor: int) -> Tensor:
    """Over blocks of `[B, C, H, W]`; not by pooling, into which ONNX's optimizer draws a padding that is too wide."""
    return x.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor)).mean((-3, -1))


def _weights(kernels: Sequence[Tensor], grid: Grid, heads: int, channels: int) -> list[Tensor]:
    """Of each level the kernels as those of a depthwise convolution whose stride is its size.

    Each is `[kinds * heads * channels * rank, 1, bins, bins]`, to be applied to means of blocks.
    """
    if not kernels:
        options = dict(variant="linear" if grid.is_linear else "loglinear", dtype=grid.dtype, device=grid.device)
        levels = range(1, grid.levels + 1)
        kernels = [start_kernels(level, grid.cell_size, grid.rank, 2, 1, 1, **options)[None] for level in levels]
    weights = []
    for stack in kernels:
        stack = stack[: grid.levels].to(grid.dtype)
        bins = int(stack.shape[-1])
        weight = stack[:, :, 0, ..., :, None] * (stack[:, :, 1, ..., None, :] * bins**-2)
        if grid.is_linear:  # key, value, query
            weight = torch.cat((weight[:, 2:] * channels**-0.5, weight[:, :2]), 1)
        weight = weight.permute(0, 1, 3, 4, 2, 5, 6).expand(-1, -1, heads, channels, -1, -1, -1)
        weights += weight.reshape(int(stack.shape[0]), -1, 1, bins, bins).unbind()
    return [weights[min(level, len(weights) - 1)] for level in range(grid.levels)]
