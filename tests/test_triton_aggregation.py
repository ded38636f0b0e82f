"""The Triton aggregation, where `triton_cases.py` says, against `Aggregation` of the torch backend in float64."""

import pytest
import torch
from fma2d.aggregation import Aggregation, BlockSums, level_kernels
from fma2d.ops.options import Options
from operator_cases import assert_within_rule, random_kernels
from operator_cases import one_thread as one_thread
from triton_cases import DEVICE, on_a_device
from triton_cases import poison as poison

from fma2d.geometry import cell_side, num_levels
from fma2d.ops import tiles, triton_aggregation
from fma2d.ops.triton_aggregation import Summaries

pytestmark = on_a_device


def tokens_of(count, shape, dtype, layout):
    """`count` arrays `[B, heads, *grid, head_dim]`."""
    batch, heads, *grid, head_dim = shape
    if layout == "fused":  # as a fused projection leaves them: in one launch
        return list(torch.randn(batch, *grid, count, heads, head_dim).to(dtype).movedim(-3, 0).movedim(-2, 2))
    if layout == "contiguous":
        return list(torch.randn(count, *shape).to(dtype))
    # No two strided alike, and channels apart.
    first = torch.randn(head_dim, batch, *grid, heads).to(dtype).movedim(0, -1).movedim(-2, 1)
    return [first, *torch.randn(count - 1, *shape).to(dtype)]


class Case:
    """Tokens, kernels, mask and cotangents of one call."""

    def __init__(self, grid, cell_size, rank, learned, *, batch=2, heads=2, head_dim=8, dtype=torch.float32,
                 masked=False, layout="fused", kernels=None):  # fmt: skip
        self.options = Options(cell_size, rank, False, True, 1.0)
        self.levels, self.dtype = num_levels(grid, cell_size), dtype
        generator = torch.Generator().manual_seed(1)
        self.kernels = kernels or [
            random_kernels(n, len(grid), cell_size, rank, heads, head_dim, generator) for n in learned
        ]
        self.kernels = [[[w.float().to(DEVICE) for w in axes] for axes in one] for one in self.kernels]
        self.tokens = tokens_of(len(learned), (batch, heads, *grid, head_dim), dtype, layout)
        self.mask = None
        if masked:
            self.mask = torch.rand(batch, *grid) < 0.6
            self.mask[0, :cell_size] = True  # full cells
            self.mask[-1, cell_size : 3 * cell_size] = False  # and empty ones
            for x in self.tokens:
                x.masked_fill_(~self.mask[:, None, ..., None], torch.nan)
            self.mask = self.mask.to(DEVICE)
        self.tokens = [x.to(DEVICE) for x in self.tokens]
        shapes = [[x.shape for x in lattices] for lattices in self.plain(torch.float64)[0]]
        self.d_lattices = [[torch.randn(s, device=DEVICE) for s in lattices] for lattices in shapes]

    def plain(self, dtype, backward=False):
        """`(lattices, results)` of the torch backend's aggregation in a dtype."""
        tokens = [x.detach().to(dtype).requires_grad_() for x in self.tokens]
        kernels = [[[w.detach().to(dtype).requires_grad_() for w in axes] for axes in one] for one in self.kernels]
        lattices = []
        for x, learned in zip(tokens, kernels, strict=True):
            x = x.movedim(1, -2)
            mask = torch.ones(x.shape[:-2], dtype=torch.bool, device=DEVICE) if self.mask is None else self.mask
            x = torch.where(mask[..., None, None], x, 0)
            sums = BlockSums(mask[..., None, None].to(dtype), dtype)
            blocks, grid, options = BlockSums(x, dtype), x.shape[1:-2], self.options
            lattices.append([
                Aggregation(level_kernels(learned, n, options.cell_size, options.rank, x), grid,
                            cell_side(n, options.cell_size), sums).forward(blocks)
                for n in range(1, self.levels + 1)
            ])  # fmt: skip
        if not backward:
            return lattices, None
        leaves = [*tokens, *(w for one in kernels for axes in one for w in axes)]
        cotangents = [d.to(dtype) for ds in self.d_lattices for d in ds]
        flat = [x for one in lattices for x in one]
        grads = list(torch.autograd.grad(flat, leaves, cotangents, allow_unused=True, materialize_grads=True))
        d_tokens = [g.movedim(1, -2) for g in grads[: len(tokens)]]
        if self.mask is not None:
            d_tokens = [torch.where(self.mask[..., None, None], d, 0) for d in d_tokens]
        return lattices, self.named(lattices, d_tokens, grads[len(tokens) :])

    def named(self, lattices, d_tokens, d_kernels):
        found = {f"level {n}": torch.cat([x.detach().flatten() for x in made])
                 for n, made in enumerate(zip(*lattices, strict=True), 1)}  # fmt: skip
        found |= {f"gradient of tokens {i}": d.detach().flatten() for i, d in enumerate(d_tokens)}
        return found | {f"gradient of kernel {i}": d.detach().flatten() for i, d in enumerate(d_kernels)}

    def run(self):
        """The results of the Triton aggregation."""
        call = (self.tokens, self.kernels, self.mask, self.options, self.levels)
        lattices = Summaries(*call).lattices
        shape = self.tokens[0].movedim(1, -2).shape
        d_tokens = [torch.full(shape, torch.nan, device=DEVICE) for _ in self.tokens]
        grads = Summaries(*call, learn=True).backward(self.d_lattices, d_tokens)
        flat = [w for one in grads for axes in one for w in axes]
        assert [d.dtype for d in flat] == [w.dtype for one in self.kernels for axes in one for w in axes]
        return self.named(lattices, d_tokens, flat)


CASES = {
    "whole cells": dict(grid=(16, 16), cell_size=4, rank=4, learned=(1, 1, 1)),
    "cut cells, any bins, start values": dict(grid=(11, 18), cell_size=4, rank=4, learned=(3, 1, 0), batch=1, heads=1),
    "odd cells, rank that does not divide": dict(grid=(16, 10), cell_size=3, rank=4, learned=(0, 1), batch=1, heads=1),
    "mask": dict(grid=(17, 21), cell_size=4, rank=2, learned=(2, 1), heads=1, masked=True),
    "mask, odd cells": dict(grid=(13, 7), cell_size=3, rank=3, learned=(1, 0), masked=True, batch=1, heads=1),
    "one axis": dict(grid=(61,), cell_size=4, rank=3, learned=(2, 0)),
    "one axis, mask": dict(grid=(61,), cell_size=4, rank=2, learned=(4, 1), masked=True),
    "one row": dict(grid=(1, 13), cell_size=4, rank=4, learned=(1, 3)),
    "contiguous, head_dim 24": dict(
        grid=(12, 13), cell_size=4, rank=4, learned=(1, 1), head_dim=24, layout="contiguous"
    ),
    "strided differently, bfloat16": dict(
        grid=(12, 13), cell_size=4, rank=4, learned=(1, 1), dtype=torch.bfloat16, layout="scattered"
    ),
    "float16, rank 16": dict(grid=(10, 9), cell_size=4, rank=16, learned=(1, 0), dtype=torch.float16, heads=1),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_results_are_those_of_the_torch_backend(case):
    case = Case(**case)
    _, truth = case.plain(torch.float64, backward=True)
    _, plain = case.plain(torch.float32, backward=True)
    assert_within_rule(case.run(), truth, plain, torch.float32)


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
def test_small_tiles_and_many_turns_give_the_same(masked, monkeypatch):
    """Tiles of a cell each, a few columns and summary tokens at once, and sums over cells in many pieces."""
    monkeypatch.setattr(tiles, "INTERPRETER", dict.fromkeys(tiles.INTERPRETER, tiles.Tile(64, 4, 1)))
    for name, value in (("MAX_COLUMNS", 2), ("MAX_RANKS", 2), ("PROGRAMS", 16)):
        monkeypatch.setattr(triton_aggregation, name, value)
    case = Case((10, 9), 4, 3, (1,), batch=1, heads=1, head_dim=3, masked=masked)
    _, truth = case.plain(torch.float64, backward=True)
    _, plain = case.plain(torch.float32, backward=True)
    assert_within_rule(case.run(), truth, plain, torch.float32)


def test_repeats_bitwise():
    case = Case((9, 10), 4, 4, (1, 1), heads=1, masked=True)
    first, again = case.run(), case.run()
    assert all(torch.equal(x, again[name]) for name, x in first.items())


def test_kernels_without_weight():
    """A summary whose kernel has no weight on what exists is 0, and so are its gradients."""
    case = Case((10, 10), 4, 4, (1,), batch=1, heads=1, head_dim=2)
    for w in case.kernels[0][0]:
        w[..., :2] = 0  # of the cells cut after 2 tokens nothing is left
    lattices, truth = case.plain(torch.float64, backward=True)
    assert (lattices[0][0][:, -2:, -2:] == 0).all()
    assert_within_rule(case.run(), truth, case.plain(torch.float32, backward=True)[1], torch.float32)


def test_no_level_no_work(monkeypatch):
    monkeypatch.setattr(triton_aggregation, "_Pass", None)
    x, options = torch.ones(1, 1, 4, 4, 2), Options(4, 4, False, True, 1.0)
    kernels = [[[torch.ones(4, 1, 1, 4)] * 2]]
    summaries = Summaries([x], kernels, None, options, 0, learn=True)
    assert summaries.lattices == [[]]
    [[[d, _]]] = summaries.backward([[]], [])
    assert d.shape == (4, 1, 1, 4) and (d == 0).all()


def test_tokens_are_read_once(monkeypatch):
    """With `cell_size` bins, every level above the first reads sums over blocks of 2**(level - 1) tokens."""
    case = Case((70, 40), 4, 1, (0,), batch=1, heads=1, head_dim=1)
    made = triton_aggregation._Pass(case.tokens, case.kernels, None, case.options, case.levels, False)
    assert [level.source for level in made.levels] == [0, 1, 2, 3]
    assert [source.views[0].shape[2:4] for source in made.sources] == [(70, 40), (35, 20), (18, 10), (9, 5)]
    assert {level.side for level in made.levels} == {(4, 4)}
