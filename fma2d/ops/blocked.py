"""The torch backend: plain PyTorch, linear memory, any device.

Levels run from the coarsest down to 0, the near field; each hands its running softmax (`State`) to the next. In the
linear variant the state lives on summary queries, and the queries of a sub-cell read that of the summary query they
belong to; in the log-linear variant it lives on the tokens.

Forward and backward run without autograd, inside the `torch.library` op. `forward` itself is made of differentiable
operations, which is how the second derivative is had (`library.py`).
"""

import torch
from torch import Tensor

from ..aggregation import BlockSums, log_counts
from ..geometry import cell_side, num_levels, tiling
from . import windows
from .cells import ABSENT, PAIRS, State, Windows
from .options import Call, Kernels
from .sources import sources

# A grid without coarse levels and of at most this many tokens is one window.
ONE_WINDOW = 1024


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """`(out, lse)`: out `[B, heads, *grid, head_dim]` in q's dtype, lse `[B, heads, *grid]` in float32 or wider."""
    run = _Run(call)
    out, lse, _ = run.attend_down_to(0)[-1]
    out = out.to(call.q.dtype)
    if call.key_mask is not None:
        out, lse = torch.where(run.exists[..., None], out, 0), torch.where(run.exists, lse, -torch.inf)
    return out.movedim(-2, 1), lse.movedim(-1, 1)


def backward(call: Call, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor) -> tuple[list[Tensor], list[Kernels]]:
    """Gradients of (q, k, v) and of the (key, value, query) kernels, zero for levels that the grid does not use."""
    run = _Run(call)
    out, lse, d_out, d_lse = out.movedim(1, -2), lse.movedim(1, -1), d_out.movedim(1, -2), d_lse.movedim(1, -1)
    if call.key_mask is not None:
        d_out, d_lse = torch.where(run.exists[..., None], d_out, 0), torch.where(run.exists, d_lse, 0)
        lse = torch.where(run.exists, lse, ABSENT)

    delta = _delta(d_out.to(run.dtype), out, d_lse)
    # The linear variant's gradients pass from state to state; the log-linear entries share one softmax.
    states = run.attend_down_to(1) if run.linear else [None] * (run.levels + 1)
    for level in range(run.levels + 1):
        inputs = run.inputs(level, states.pop())
        buffers = [buffer for source in run.sources for buffer in source.buffers(level)]
        d_state = windows.backward(*inputs, lse, delta, d_out, *buffers)
        for source in run.sources:
            source.collect(level)
        if d_state is not None:
            value, lse, _ = inputs[-1]
            d_out, delta = d_state.value, _delta(d_state.value, value, d_state.lse)

    d_tokens = []
    for x, grad in zip(call[:3], (grad for source in run.sources for grad in source.token_grads()), strict=True):
        if call.key_mask is not None:
            grad = torch.where(run.exists[..., None], grad, 0)
        d_tokens.append(grad.movedim(-2, 1).to(x.dtype))
    queries, keys, values = (grads for source in run.sources for grads in source.kernel_grads())
    return d_tokens, [keys, values, queries]


def _delta(d_out: Tensor, out: Tensor, d_lse: Tensor) -> Tensor:
    rows = max(1, PAIRS // d_out[:, :1].numel()) if d_out.numel() else 1
    pieces = zip(d_out.split(rows, 1), out.split(rows, 1), strict=True)
    return torch.cat([(x * y).sum(-1) for x, y in pieces], 1) - d_lse


class _Run:
    """A call: its tokens as `[B, *grid, heads, head_dim]` with absent ones zero, and what each level attends to."""

    def __init__(self, call: Call):
        options, self.mask = call.options, call.key_mask
        self.options, self.grid, self.device = options, call.q.shape[2:-1], call.q.device
        self.levels = num_levels(self.grid, options.cell_size)
        self.parts = tiling(options.rank, len(self.grid))
        self.dtype = torch.promote_types(call.q.dtype, torch.float32)
        self.linear = call.query_kernels is not None
        tokens = [x.movedim(1, -2) for x in call[:3]]
        if self.mask is not None:
            self.exists = self.mask[..., None]
            tokens = [torch.where(self.exists[..., None], x, 0) for x in tokens]
        exist = torch.ones(1, *self.grid, device=self.device) if self.mask is None else self.mask
        self.exist_sums = BlockSums(exist[..., None, None].to(self.dtype), self.dtype)
        kernels = [call.query_kernels, call.key_kernels, call.value_kernels]
        self.sources = sources(tokens, kernels, options, self.exist_sums, self.mask is not None, self.dtype)

    def attend_down_to(self, last: int) -> list[State | None]:
        """The states after each level from the coarsest to `last`, after a None for the one before it."""
        states = [None]
        for level in range(self.levels, last - 1, -1):
            states.append(State(*windows.forward(*self.inputs(level, states[-1]), self.dtype)))
            if not self.linear:
                states = states[-1:]
        return states

    def inputs(self, level: int, state: State | None):
        """`(q, k, v, windows, bias, state)` of a level."""
        q, k, v = (x for source in self.sources for x in source.at(level))
        if self.linear and state is not None:
            state = state._replace(parts=self.parts)
        return q, k, v, self._windows(level), self._bias(level, k), state

    def _bias(self, level: int, keys: Tensor) -> Tensor | None:
        if level == 0:
            return None if self.mask is None else torch.where(self.mask, 0, ABSENT).to(self.dtype)
        log_n = log_counts(self.grid, level, self.options.cell_size, self.options.rank, self.mask, keys, ABSENT)
        return log_n if self.options.count_bias else torch.where(log_n > ABSENT / 2, 0, ABSENT).to(self.dtype)

    def _windows(self, level: int) -> Windows:
        options, causal = self.options, self.options.causal
        device = self.device
        if level == 0:
            cell = (options.cell_size,) * len(self.grid)
            if self.levels == 0 and self.grid.numel() <= ONE_WINDOW:
                cell = tuple(self.grid)
            exclude = None
            if causal:
                token = torch.arange(cell[0], device=device)
                exclude = (torch.cat((token - cell[0], token)) > token[:, None],)
            return Windows(cell, cell, 0 if causal else 1, exclude, options.scale)
        # The cells are parents, the window is theirs; what a child is next to belongs to a finer level.
        side = cell_side(level, options.cell_size)
        query_parts = self.parts if self.linear else (side,) * len(self.grid)
        exclude = []
        for query_part, part in zip(query_parts, self.parts, strict=True):
            query_child = torch.arange(2 * query_part, device=device)[:, None] // query_part
            key_child = torch.arange((4 if causal else 6) * part, device=device) // part - 2
            exclude.append(key_child >= query_child - 1 if causal else (key_child - query_child).abs() <= 1)
        query_cell, key_cell = tuple(2 * p for p in query_parts), tuple(2 * p for p in self.parts)
        return Windows(query_cell, key_cell, 0 if causal else 1, tuple(exclude), options.scale)
