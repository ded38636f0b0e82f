"""The cover, cells, sub-cells and start kernels, against their definitions by brute force."""

from fractions import Fraction
from itertools import product
from math import ceil, log2, prod

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fma2d import cover, geometry, num_levels, start_kernels

EXTENTS = {1: (1, 2, 17, 48, 59, 90), 2: (1, 3, 12, 16, 17, 19), 3: (1, 2, 5, 7, 9)}
SIDES = st.integers(1, 12)
PARTS = st.integers(1, 7)


@st.composite
def queries(draw, ndims=(1, 2, 3)):
    """`(grid, cell_size, token)`."""
    ndim = draw(st.sampled_from(ndims))
    grid = tuple(draw(st.sampled_from(EXTENTS[ndim])) for _ in range(ndim))
    token = tuple(draw(st.sampled_from(range(extent))) for extent in grid)
    return grid, draw(st.sampled_from((1, 1, 2, 3, 5))), token


def apart(a, b, side):
    """How many cells of a side lie between two tokens, on the axis where they are the most."""
    return max(abs(x // side - y // side) for x, y in zip(a, b, strict=True))


def expected_cover(grid, cell_size, token, causal):
    """Token by token: near if its base cell is a neighbour of mine, else in its cell of the least level whose parents
    are neighbours."""
    near, far = [], set()
    for other in product(*map(range, grid)):
        if causal and other > token:
            continue
        if apart(token, other, cell_size) <= 1:
            near.append(other)
            continue
        level = 1
        while apart(token, other, cell_size * 2**level) > 1:
            level += 1
        side = cell_size * 2 ** (level - 1)
        cell = tuple(t // side for t in other)
        bounds = tuple((c * side, min((c + 1) * side, extent)) for c, extent in zip(cell, grid, strict=True))
        far.add((level, cell, bounds))
    return near, sorted(far)


@settings(max_examples=300)
@given(queries(), st.booleans())
def test_cover_is_the_definition_and_a_partition(query, causal):
    grid, cell_size, token = query
    causal = causal and len(grid) == 1
    near, far = cover(grid, cell_size, token, causal)
    assert (near, far) == expected_cover(grid, cell_size, token, causal)
    covered = near + [t for _, _, bounds in far for t in product(*(range(*span) for span in bounds))]
    tokens = product(*map(range, grid)) if not causal else product(range(token[0] + 1))
    assert sorted(covered) == list(tokens)
    assert {level for level, _, _ in far} <= set(range(1, num_levels(grid, cell_size) + 1))


@given(queries())
def test_cover_has_the_promised_size(query):
    """At most `(3r)^D` near tokens, and 3, 27 or 189 cells a level."""
    grid, cell_size, token = query
    near, far = cover(grid, cell_size, token)
    assert len(near) <= (3 * cell_size) ** len(grid)
    for level in range(1, num_levels(grid, cell_size) + 1):
        assert sum(entry[0] == level for entry in far) <= {1: 3, 2: 27, 3: 189}[len(grid)]


@given(queries(ndims=(1,)), st.integers(0, 100))
def test_causal_cover_depends_on_the_position_only(query, more):
    grid, cell_size, token = query
    assert cover((token[0] + 1,), cell_size, token, True) == cover((grid[0] + more,), cell_size, token, True)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(-1, 1)), min_size=1, max_size=3), st.integers(1, 40))
def test_number_of_levels(powers, cell_size):
    """The formula, and what it is for: above the last level there are at most two cells a side, never below it."""
    grid = [max(1, cell_size * 2**exponent + more) for exponent, more in powers]
    levels = num_levels(tuple(grid), cell_size)
    cells = max(ceil(Fraction(extent, cell_size)) for extent in grid)
    assert levels == max(0, ceil(log2(cells)) - 1)
    for level in range(1, levels + 2):
        side = geometry.cell_side(level, cell_size)
        assert side == cell_size * 2 ** (level - 1)
        assert (max(geometry.num_cells(grid, side)) > 2) == (level <= levels)


@pytest.mark.parametrize("ndim", (1, 2, 3))
def test_tiling_is_the_most_equal_factorisation(ndim):
    for rank in range(1, 65):
        factors = [f for f in range(1, rank + 1) if rank % f == 0]
        ways = [p for p in product(factors, repeat=ndim) if prod(p) == rank and list(p) == sorted(p)]
        tiling = geometry.tiling(rank, ndim)
        assert tiling in ways
        assert tiling[-1] - tiling[0] == min(p[-1] - p[0] for p in ways)


@given(st.integers(1, 100), SIDES, PARTS)
def test_subcells_follow_the_formula_and_nest(extent, side, parts):
    fine, coarse = (geometry.subcells(extent, s, parts) for s in (side, 2 * side))
    for token, (sub, above) in enumerate(zip(fine, coarse, strict=True)):
        cell, offset = divmod(token, side)
        assert sub == cell * parts + ((2 * offset + 1) * parts) // (2 * side)
        assert sub // 2 == above


@given(st.integers(1, 100), SIDES, PARTS)
def test_counts_are_overlaps_and_add_up_to_the_tokens(extent, side, parts):
    def overlap(offset, part):
        start, stop = Fraction(part * side, parts), Fraction((part + 1) * side, parts)
        return max(0, min(offset + 1, stop) - max(offset, start))

    overlaps = geometry.subcell_overlaps(side, parts)
    assert overlaps == tuple(tuple(parts * overlap(o, k) for o in range(side)) for k in range(parts))
    counts = geometry.subcell_counts(extent, side, parts)
    cells = [range(start, min(extent, start + side)) for start in range(0, extent, side)]
    assert all(isinstance(n, int) for n in counts)
    assert counts == tuple(parts * sum(overlap(t % side, k) for t in cell) for cell in cells for k in range(parts))
    for i, cell in enumerate(cells):
        assert sum(counts[i * parts : (i + 1) * parts]) == parts * len(cell)


@given(
    st.integers(1, 3),
    st.integers(1, 4),
    st.sampled_from((1, 2, 3, 4, 6, 8)),
    st.integers(1, 3),
    st.sampled_from((None, "side", "one", "double")),
    st.sampled_from((torch.float64, torch.float32, torch.bfloat16)),
)
def test_start_kernels_are_the_area_of_each_subcell(level, cell_size, rank, ndim, bins, dtype):
    side, parts = cell_size * 2 ** (level - 1), geometry.tiling(rank, ndim)
    bins = {None: None, "side": side, "one": 1, "double": 2 if side % 2 == 0 else side}[bins]
    kernels = start_kernels(level, cell_size, rank, ndim, 2, 3, bins=bins, dtype=dtype)
    bins = bins or (side if any(cell_size % p for p in parts) else cell_size)
    assert kernels.shape == (2, ndim, rank, 2, 3, bins) and kernels.dtype == dtype
    assert torch.equal(kernels[0], kernels[1])
    linear = start_kernels(level, cell_size, rank, ndim, 2, 3, variant="linear", bins=bins, dtype=dtype)
    assert torch.equal(linear, kernels[:1].expand_as(linear))
    for axis, kernel in enumerate(kernels[0]):
        for k, index in enumerate(product(*map(range, parts))):
            start, stop = (Fraction(bins * (index[axis] + i), parts[axis]) for i in (0, 1))
            share = [Fraction(max(0, min(b + 1, stop) - max(b, start))) * parts[axis] for b in range(bins)]
            assert sum(share) == bins
            expected = torch.tensor([float(x) for x in share], dtype=torch.float64).to(dtype)
            torch.testing.assert_close(kernel[k], expected.expand(2, 3, -1), rtol=1e-15, atol=0)


@pytest.mark.parametrize(
    "grid, cell_size, token, causal, name",
    [
        ((), 2, (), False, "grid"),
        ((2, 2, 2, 2), 2, (0, 0, 0, 0), False, "grid"),
        ((4, 0), 2, (0, 0), False, "grid"),
        ((4,), 0, (0,), False, "cell_size"),
        ((4,), 2, (4,), False, "token"),
        ((4,), 2, (-1,), False, "token"),
        ((4,), 2, (0, 0), False, "token"),
        ((4, 4), 2, (0, 0), True, "causal"),
    ],
)
def test_cover_refuses_by_name(grid, cell_size, token, causal, name):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        cover(grid, cell_size, token, causal)
    if name in ("grid", "cell_size"):
        with pytest.raises(ValueError, match=rf"^{name}\b"):
            num_levels(grid, cell_size)
    with pytest.raises(TypeError, match=r"^grid\b"):
        num_levels((13.0,), 8)
    assert num_levels((np.int64(50), 7), 8) == num_levels((50, 7), 8) == 2


@pytest.mark.parametrize(
    "changes, name",
    [
        ({"level": 0}, "level"),
        ({"cell_size": 0}, "cell_size"),
        ({"rank": 0}, "rank"),
        ({"ndim": 0}, "ndim"),
        ({"ndim": 4}, "ndim"),
        ({"bins": 0}, "bins"),
        ({"bins": 3}, "bins"),
        ({"bins": 16}, "bins"),
    ],
)
def test_start_kernels_refuse_by_name(changes, name):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        start_kernels(**({"level": 2, "cell_size": 4, "rank": 2, "ndim": 2, "heads": 1, "head_dim": 1} | changes))


@pytest.mark.parametrize(
    "grid, causal", (((37,), False), ((37,), True), ((64,), True), ((13, 21), False), ((5, 6, 7), False))
)
@pytest.mark.parametrize("cell_size", (1, 2, 4))
def test_pairs_are_those_of_the_covers(grid, causal, cell_size):
    rank = 2
    covers = [cover(grid, cell_size, token, causal) for token in product(*map(range, grid))]
    near, far = geometry.count_pairs(grid, cell_size, rank, linear=False, causal=causal)
    assert near == sum(len(tokens) for tokens, _ in covers)
    assert far == rank * sum(len(cells) for _, cells in covers)
    if not causal:
        # Every summary query of a cell has the far cells of the tokens in it.
        lists = {
            (level, tuple(t // geometry.cell_side(level, cell_size) for t in token), cell)
            for token, (_, cells) in zip(product(*map(range, grid)), covers, strict=True)
            for level, cell, _ in cells
        }
        assert geometry.count_pairs(grid, cell_size, rank, linear=True)[1] == rank**2 * len(lists)
