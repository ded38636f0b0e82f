"""Calls of the operator drawn at random, its definition written a second time, and the rule for numerical errors.

`definition` follows the specification's text and takes nothing from the library but `cover` and `start_kernels`, which
have tests of their own. It runs in the dtype of q: it is the oracle in float64 and `plain` in every other dtype.
"""

import sys
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from itertools import product
from math import prod
from unittest.mock import patch

import pytest
import torch
from hypothesis import strategies as st

from fma2d import cover, multipole_attention, num_levels, start_kernels

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("reference", "torch")
KERNELS = ("key_kernels", "value_kernels", "query_kernels")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """For the module that imports it: on a busy machine, threads over tensors so small only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Call(dict):
    """Keyword arguments of one call, printed by shape."""

    def __repr__(self):
        def text(x):
            if isinstance(x, torch.Tensor):
                return f"{str(x.dtype).removeprefix('torch.')}{list(x.shape)}"
            return f"[{', '.join(map(text, x))}]" if isinstance(x, list) else repr(x)

        return f"Call({', '.join(f'{name}={text(x)}' for name, x in self.items())})"

    @property
    def grid(self):
        return tuple(self["q"].shape[2:-1])

    @property
    def exists(self):
        """`[B, 1, *grid]`, bool."""
        shape = (self["q"].shape[0], *self.grid)
        mask = self["key_mask"]
        return torch.ones(shape, dtype=torch.bool)[:, None] if mask is None else mask.expand(shape)[:, None]

    def map(self, token, kernel=None):
        """The call with `token` applied to q, k and v and then `kernel` (default: the same) to every kernel."""
        kernel = kernel or token
        changes = {name: token(self[name]) for name in "qkv"}
        for name in KERNELS:
            if self[name] is not None:
                changes[name] = [[kernel(w) for w in level] for level in self[name]]
        return Call(self | changes)

    def to(self, dtype, kernel_dtype=None):
        """The call in another dtype, its tensors new leaves that need a gradient."""

        def leaf(x, dtype):
            return x.detach().to(dtype, copy=True).requires_grad_()

        return self.map(lambda x: leaf(x, dtype), lambda w: leaf(w, kernel_dtype or dtype))

    def leaves(self):
        """The tensors that take gradients."""
        return [x for tensors in self.groups().values() for x in tensors]

    def with_leaves(self, leaves):
        """The call with other tensors in the place of `leaves()`."""
        rest = iter(leaves)
        return self.map(lambda _: next(rest))

    def groups(self):
        """The tensors that take gradients, by argument."""
        groups = {name: [self[name]] for name in "qkv"}
        groups |= {name: [w for level in self[name] or [] for w in level] for name in KERNELS}
        return {name: tensors for name, tensors in groups.items() if tensors}

    def run(self, backend, **changes):
        """`(out, lse)` of a backend; of `definition` for the backend `"definition"`."""
        if backend == "definition":
            return definition(**{**self, **changes})
        return multipole_attention(**{**self, **changes}, return_lse=True, backend=backend)

    def results(self, backend, cotangents=None, arrange=lambda call: call):
        """Out and lse where tokens exist, and the gradients, one vector for each argument: `{name: vector}`.

        Args:
            cotangents: of out and lse; None for no gradients.
            arrange: a differentiable function from this call to the one that the backend gets.
        """
        call = arrange(self)
        with torch.set_grad_enabled(cotangents is not None):
            out, lse = call.run(backend)
        exists = call.exists.expand(lse.shape)
        assert (out[~exists] == 0).all() and (lse[~exists] == -torch.inf).all()
        results = {"out": out[exists].flatten().detach(), "lse": lse[exists].detach()}
        if cotangents is not None:
            groups = self.groups()
            cotangents = [c.to(x.dtype) for c, x in zip(cotangents, (out, lse), strict=True)]
            unused = {} if backend == "torch" else {"allow_unused": True, "materialize_grads": True}
            grads = iter(torch.autograd.grad((out, lse), self.leaves(), cotangents, **unused))
            for name, tensors in groups.items():
                results[f"gradient of {name}"] = torch.cat([next(grads).flatten() for _ in tensors])
        return results


def cotangents(call, seed=1):
    """Gradients of out and lse, float64."""
    shape, generator = call["q"].shape, torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape[:-1])]


def assert_within_rule(results, truth, plain, dtype, kernel_dtype=None):
    """The error rule: `max|x - truth| <= 2 max|plain - truth| + 4 eps max|truth|` for every result."""
    assert results.keys() == truth.keys()
    for name, x in results.items():
        t, p = truth[name].double(), plain[name].double()
        eps = torch.finfo(dtype).eps
        if kernel_dtype is not None and name.endswith("kernels"):
            eps = max(eps, torch.finfo(kernel_dtype).eps)
        assert x.isfinite().all(), name
        if x.numel():
            error, allowed = (x.double() - t).abs().max(), 2 * (p - t).abs().max() + 4 * eps * t.abs().max()
            assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_same(results, expected, tolerance=1e-11):
    """Float64 results equal to rounding, relative to the largest of each."""
    assert results.keys() == expected.keys()
    for name, x in results.items():
        if x.numel():
            error, most = (x - expected[name]).abs().max(), expected[name].abs().max().clamp(min=1)
            assert error <= tolerance * most, f"{name}: error {error:.3g} of {most:.3g}"


# The torch backend's ways through a call, which it chooses by size, and the constants that force each on a small one.
WAYS = {
    "as it is": {},
    "slabs": {"SMALL": 0, "SLAB": 1, "LEAST_CELLS": 3},
    "slabs in many tiles": {"SMALL": 0, "SLAB": 1, "LEAST_CELLS": 1, "PAIRS": 100, "PIECE": 50, "ONE_WINDOW": 10},
    "gathered in many tiles": {"SMALL": 1 << 40, "PAIRS": 100, "GATHERED": 100, "PIECE": 50, "ONE_WINDOW": 10},
}


@contextmanager
def forced(way):
    """Set the constants of a way wherever the library holds them."""
    modules = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "fma2d"]
    with ExitStack() as stack:
        for name, value in WAYS[way].items():
            holders = [module for module in modules if hasattr(module, name)]
            assert holders, f"no module has {name}"
            for module in holders:
                stack.enter_context(patch.object(module, name, value))
        yield


@lru_cache(maxsize=64)
def _relations(grid, cell_size, causal):
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


def definition(
    q, k, v, key_kernels, value_kernels, *, cell_size, rank, query_kernels, causal, key_mask, count_bias, scale
):
    """`(out, lse)` in q's dtype, dense, from the specification's text."""
    batch, _, *grid, head_dim = q.shape
    ndim, parts = len(grid), _tiling(rank, len(grid))
    scale = head_dim**-0.5 if scale is None else scale
    exists = torch.ones(batch, *grid, dtype=torch.bool) if key_mask is None else key_mask.expand(batch, *grid)
    q, k, v = (torch.where(exists[:, None, ..., None], x, 0).flatten(2, -2) for x in (q, k, v))
    exists = exists.flatten(1)
    position = torch.tensor(list(product(*map(range, grid)))).T  # [D, n]
    subcell = torch.tensor(list(product(*map(range, parts)))).T  # [D, p]
    near, far = _relations(tuple(grid), cell_size, causal)

    def learned(kernels, level):
        if kernels:
            return kernels[min(level, len(kernels)) - 1]
        return start_kernels(level, cell_size, rank, ndim, 1, 1, dtype=torch.float64)

    def summarise(x, kernels, level):  # x [B, heads, n, head_dim] -> [B, cells, p, heads, head_dim]
        side = cell_size * 2 ** (level - 1)
        weight, whole = 1, 1  # of every token [p, heads, head_dim, n]; sum over a full cell [p, heads, head_dim]
        for axis, w in enumerate(learned(kernels, level)):
            w = w.to(torch.promote_types(x.dtype, torch.float32)) * w.shape[-1] / side
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
        keys, vals = summarise(k, key_kernels, level), summarise(v, value_kernels, level)
        queries = q.transpose(1, 2)  # [B, n, heads, head_dim]
        if query_kernels is not None:
            own_cell = _members(position, grid, side).argmax(0)
            own_part = torch.zeros_like(own_cell)
            for axis, p in enumerate(parts):
                own_part = own_part * p + (2 * (position[axis] % side) + 1) * p // (2 * side)
            queries = summarise(q, query_kernels, level)[:, own_cell, own_part]
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


def _kernel(rank, heads, head_dim, bins, generator):
    """Random signs, sizes about that of the start value, and some weights that are 0, but never all of a kernel."""
    size = torch.rand(rank, heads, head_dim, bins, generator=generator, dtype=torch.float64) + 0.5
    sign = torch.randint(0, 2, size.shape, generator=generator) * 2 - 1
    keep = torch.rand(size.shape, generator=generator) > 0.1
    keep[..., torch.randint(bins, (), generator=generator)] = True
    return size * sign * keep / bins


def random_kernels(levels, ndim, cell_size, rank, heads, head_dim, generator):
    """Learned kernels for `levels` levels; every kernel shares heads or channels, and has bins, as it happens."""

    def one(level):
        side = cell_size * 2 ** (level - 1)
        bins = [b for b in range(1, side + 1) if side % b == 0]
        h, d, b = (x[torch.randint(len(x), (), generator=generator)] for x in ((1, heads), (1, head_dim), bins))
        return _kernel(rank, h, d, b, generator)

    return [[one(level) for _ in range(ndim)] for level in range(1, levels + 1)]


def random_call(
    grid,
    cell_size,
    rank,
    *,
    batch=1,
    heads=2,
    head_dim=3,
    levels=(1, 2),
    linear=None,
    causal=False,
    mask=None,
    count_bias=True,
    scale=None,
    seed=0,
):
    """A call with random tokens and kernels, float64.

    Args:
        levels: numbers of levels of the key and of the value kernels.
        linear: number of levels of the query kernels; None for the log-linear variant.
        mask: the share of tokens that exist, or a mask, or None.
    """
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, batch, heads, *grid, head_dim, generator=generator, dtype=torch.float64)
    kernels = [
        None if n is None else random_kernels(n, len(grid), cell_size, rank, heads, head_dim, generator)
        for n in (*levels, linear)
    ]
    if isinstance(mask, float):
        mask = torch.rand(batch, *grid, generator=generator) < mask
    return Call(
        q=q,
        k=k,
        v=v,
        cell_size=cell_size,
        rank=rank,
        causal=causal,
        key_mask=mask,
        count_bias=count_bias,
        scale=scale,
        **dict(zip(KERNELS, kernels, strict=True)),
    )


def nearly_weightless(masked):
    """Kernels whose zeros a first step of training made 1e-20, in float32: cut cells divide by 1e-40."""
    kernels = [[torch.where(w == 0, 1e-20, w) for w in start_kernels(level, 2, 4, 2, 2, 8)] for level in (1, 2)]
    call = random_call((9, 9), 2, 4, heads=2, head_dim=8, levels=(2, 2), linear=2)
    if masked:
        call["key_mask"] = torch.rand(len(call["q"]), 9, 9, generator=torch.Generator().manual_seed(0)) > 0.4
    return Call(call | dict.fromkeys(KERNELS, kernels)).to(torch.float32)


# By number of axes: extents (1, primes, one off a multiple) and cell sizes that give up to 6 levels.
EXTENTS = {1: (1, 2, 9, 16, 31, 37, 64, 67), 2: (1, 3, 7, 8, 9, 11), 3: (1, 2, 3, 4, 5)}
CELL_SIZES = {1: (1, 2, 3, 4, 6), 2: (1, 2, 3), 3: (1, 1, 2)}


KINDS = ("1D", "1D causal", "1D linear", "2D", "2D linear", "3D", "3D linear")


@st.composite
def grids(draw, ndims=(1, 2, 3)):
    """`(grid, cell_size)`."""
    ndim = draw(st.sampled_from(ndims))
    extents = st.sampled_from(EXTENTS[ndim])
    return tuple(draw(extents) for _ in range(ndim)), draw(st.sampled_from(CELL_SIZES[ndim]))


@st.composite
def calls(draw, kinds=KINDS, masks=True):
    """A call in float64 of one of some kinds, with and without kernels, mask, count bias and scale."""
    kind = draw(st.sampled_from(kinds))
    grid, cell_size = draw(grids((int(kind[0]),)))
    rank = draw(st.sampled_from((1, 2, 3, 4, 6, 8)))
    batch = draw(st.sampled_from((1, 2)))
    most = num_levels(grid, cell_size) + 1
    levels = [draw(st.integers(0, most)) for _ in range(3)]
    mask = draw(st.sampled_from((None, *masks * ("batch", "shared", "last axis", "one empty"))))
    if mask is not None:
        shape = {"shared": (1, *grid), "last axis": grid[-1:]}.get(mask, (batch, *grid))
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
        exists = torch.rand(shape, generator=generator) < draw(st.sampled_from((0.3, 0.8)))
        if mask == "one empty":
            exists[0] = False
        mask = exists
    return random_call(
        grid,
        cell_size,
        rank,
        batch=batch,
        heads=draw(st.sampled_from((1, 2))),
        head_dim=draw(st.integers(1, 5)),
        levels=levels[:2],
        linear=levels[2] if "linear" in kind else None,
        causal="causal" in kind,
        mask=mask,
        count_bias=draw(st.booleans()),
        scale=draw(st.sampled_from((None, None, 0.7, -1, 0))),
        seed=draw(st.integers(0, 2**20)),
    )
