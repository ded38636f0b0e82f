"""Attention of every cell's queries to a window of cells around it: the one primitive of the torch backend.

Near field and far field are the same shape of work: the queries of a cell attend to the cell itself and its
neighbours. In the near field the cells hold tokens; at a coarse level they are parents that hold summary tokens, their
own neighbours excluded by a fixed pattern. `slabs.py` and, for small cells, `gather.py` cut the arrays into tiles; this
file computes on them.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from .cells import ABSENT, Piece, State, Windows, is_followed
from .gather import SMALL, pairs_per_cell, runs
from .slabs import rows


def forward(
    q: Tensor, k: Tensor, v: Tensor, windows: Windows, bias: Tensor | None, state: State | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Attend, from `state` on.

    Args:
        q: `[B, *queries, heads, head_dim]`.
        k, v: `[B, *keys, heads, head_dim]`.
        bias: added to the scores of each key, `[B | 1, *keys]`, at least `ABSENT`.
        dtype: what to compute in.

    Returns:
        In `dtype`: out like q, lse `[B, *queries, heads]` (below `ABSENT / 2` for an empty query).
    """
    out = q.new_empty(q.shape, dtype=dtype)
    lse = q.new_empty(q.shape[:-1], dtype=dtype)
    # What is gathered has addends all the same, for what lies outside the grid.
    fused = bias is None and windows.exclude is None and q.device.type == "cpu" and not is_followed()
    for row in _pieces(q, k, windows, bias, dtype, fused):
        queries, keys, values = row.queries(q), row.keys(k), row.keys(v)
        addends = row.addends(bias)
        outs, lses = queries.empty_like(), queries.empty_like(1)
        for tile in row.tiles():
            inputs, addend = (queries[tile], keys[tile], values[tile]), addends[tile]
            if fused and addend is None:
                tile_out, tile_lse = _attend_fused(*inputs, windows.scale)
            else:
                tile_out, tile_lse = _attend(*inputs, addend, windows.scale)
            outs[tile].copy_(tile_out)
            lses[tile].copy_(tile_lse)
        row_out, row_lse = outs.data, lses.data
        if state is not None:
            row_out, row_lse = _merge(row_out, row_lse, *row.before(state))
        row.write(out, row_out)
        row.write(lse[..., None], row_lse)
    return out, lse


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    windows: Windows,
    bias: Tensor | None,
    state: State | None,
    lse: Tensor,
    delta: Tensor,
    d_out: Tensor,
    d_q: Tensor,
    d_k: Tensor,
    d_v: Tensor,
) -> State | None:
    """Add the gradients of q, k and v into `d_q`, `d_k`, `d_v`; probabilities are recomputed.

    Args:
        state: None, or one of shared entries.
        lse: of the whole softmax that these entries are part of, `[B, *queries, heads]`.
        delta: `sum(d_out * out) - d_lse`, `[B, *queries, heads]`.
        d_q, d_k, d_v: like q, k, v, in the dtype to compute in.

    Returns:
        With a state, the gradients of its value and lse.
    """
    lse = torch.where(lse < ABSENT / 2, -ABSENT, lse)  # empty queries: probabilities 0
    d_state = None if state is None else State(torch.empty_like(state.value), torch.empty_like(state.lse), state.parts)
    for row in _pieces(q, k, windows, bias, d_q.dtype):
        queries, keys, values = row.queries(q), row.keys(k), row.keys(v)
        addends = row.addends(bias)
        lses, deltas, d_outs = row.lses(lse), row.queries(delta[..., None]), row.queries(d_out)
        row_d_q, row_d_k, row_d_v = queries.empty_like(), keys.zeros_like(), values.zeros_like()
        if state is not None:
            carried = row.carried(state)
            d_carried = carried.zeros_like()
        for tile in row.tiles():
            weights = _scores(queries[tile], keys[tile], addends[tile], windows.scale).sub_(lses[tile]).exp_()
            d_scores = torch.bmm(d_outs[tile], values[tile].mT).sub_(deltas[tile]).mul_(weights)
            row_d_q[tile].copy_(torch.bmm(d_scores, keys[tile]))
            row_d_k.add_product(tile, d_scores, queries[tile], windows.scale)
            row_d_v.add_product(tile, weights, d_outs[tile])
            if state is not None:
                before, value_before = carried[tile]
                weights = (before - lses[tile]).exp_()
                d_before = torch.bmm(d_outs[tile], value_before.mT).sub_(deltas[tile]).mul_(weights)
                d_carried.value[tile].baddbmm_(weights.mT, d_outs[tile])
                d_carried.lse[tile].add_(d_before.sum(1)[..., None])
        row.add(d_q, row_d_q.data, windows.scale)
        row.add_keys(d_k, row_d_k)
        row.add_keys(d_v, row_d_v)
        if state is not None:
            row.write_carried(d_state, d_carried)
    return d_state


def _pieces(
    q: Tensor, k: Tensor, windows: Windows, bias: Tensor | None, dtype: torch.dtype, fused: bool = False
) -> Iterator[Piece]:
    if pairs_per_cell(windows) <= SMALL:
        return runs(q, k, windows, dtype)
    # Rings are overwritten from row to row, which autograd cannot follow.
    return rows(q, k, windows, dtype, ring=bias is None and not is_followed(), fused=fused)


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `_attend`, without addend, by what `scaled_dot_product_attention` runs on a CPU; one more axis may lead.

    It is called by its own name because that returns the lse.
    """
    # Four axes are asked for, and channels side by side.
    inputs = [x[None] if x.dim() == 3 else x for x in (q, k, v)]
    inputs = [x if x.stride(-1) == 1 else x.contiguous() for x in inputs]
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*inputs, scale=scale)
    return out.view(q.shape), lse[..., None].view(*q.shape[:-1], 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, addend: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Attention of `[cells, rows, channels]` to `[cells, window, channels]`: its output, its lse `[cells, rows, 1]`."""
    scores = _scores(q, k, addend, scale)
    # Results do not depend on `top`, so no gradient passes through it.
    top = scores.detach().amax(-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    total = weights.sum(-1, keepdim=True)
    return torch.bmm(weights, v) / total, total.log() + top


def _merge(out: Tensor, lse: Tensor, before: Tensor, lse_before: Tensor) -> tuple[Tensor, Tensor]:
    """One softmax over the entries of two, of which outputs (the first is overwritten) and lse are given."""
    top = torch.maximum(lse_before, lse).detach()
    lse_after = ((lse_before - top).exp() + (lse - top).exp()).log() + top
    return out.lerp_(before, (lse_before - lse_after).exp()), lse_after


def _scores(q: Tensor, k: Tensor, addend: Tensor | None, scale: float) -> Tensor:
    if addend is None:
        return torch.baddbmm(q.new_empty(()), q, k.mT, beta=0, alpha=scale)
    return torch.baddbmm(addend, q, k.mT, alpha=scale)
