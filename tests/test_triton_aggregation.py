"""The Triton aggregation, where `triton_cases.py` says, against the torch backend's in float64."""

import pytest
import torch
from triton_cases import DEVICE, a_call, assert_within_rule, moved, on_a_device
from triton_cases import poison as poison

from fma2d.ops.torch_backend import aggregation as torch_aggregation

backend = pytest.importorskip("fma2d.ops.triton_backend")
aggregation = pytest.importorskip("fma2d.ops.triton_backend.aggregation")
tiles = backend.tiles
pytestmark = on_a_device


@torch.no_grad()
def of_torch(call, d_lattices):
    """Lattices and gradients by the torch backend, in the dtype of q."""
    kinds = (call.k, call.v, call.q)[: 3 if call.linear else 2]
    lattices, d_tokens = [], []
    d_kernels = [torch.zeros_like(w) for w in call.kernels]
    for kind, x in enumerate(kinds):
        made = torch_aggregation.Aggregation(call, x.movedim(1, -2), [kind], x.dtype, learn=True)
        d = torch.zeros_like(x.movedim(1, -2))
        shapes = {n: lattice.shape for n, lattice in made.lattices.items()}
        pieces = d_lattices[kind].to(x.dtype).split([s[1:-2].numel() for s in shapes.values()], 1)
        levels = {n: p.unflatten(1, s[1:-2]) for p, (n, s) in zip(pieces, shapes.items(), strict=True)}
        for total, own in zip(d_kernels, made.down(levels, [d]), strict=True):
            total += own
        lattices.append(torch.cat([lattice.flatten(1, -3) for lattice in made.lattices.values()], 1))
        d_tokens.append(d)
    return named(torch.stack(lattices), torch.stack(d_tokens), d_kernels)


def of_triton(call, d_lattices):
    plan = backend._plan(backend._signature(call))
    assert plan.aggregation.is_fused
    kept = plan.aggregation.forward(call, learn=True)
    d_tokens, d_kernels = plan.aggregation.backward(call, kept, d_lattices)
    return named(kept.lattices, d_tokens.view(len(d_tokens), *call.q.movedim(1, -2).shape), d_kernels)


def named(lattices, d_tokens, d_kernels):
    return dict(lattices=lattices, tokens=d_tokens) | {f"stack {i}": d for i, d in enumerate(d_kernels)}


def check(**settings):
    call = a_call(**settings)
    entries = backend._plan(backend._signature(call)).entries
    kinds = 3 if call.linear else 2
    d_lattices = torch.randn(kinds, call.q.shape[0], entries, call.q.shape[1], call.q.shape[-1])
    truth = of_torch(moved(call, "cpu", torch.float64, torch.float64), d_lattices)["lattices"]
    # A summary that speaks for no token is 0 there and anything here: nothing attends to it, so it has no gradient.
    seen = truth != 0
    d_lattices *= seen
    truth = of_torch(moved(call, "cpu", torch.float64, torch.float64), d_lattices)
    plain = of_torch(moved(call, "cpu", torch.float32), d_lattices)
    with torch.no_grad():
        found = of_triton(moved(call), d_lattices.to(DEVICE))
    found["lattices"] *= seen.to(DEVICE)
    assert_within_rule(found, truth, plain, torch.float32)


CASES = {
    "one level": dict(grid=(16, 8), cell_size=4, rank=4, batch=2, heads=2),
    "three levels, two of them of one source": dict(grid=(32, 4), cell_size=2, rank=1, learned=(2,), head_dim=3),
    "three levels, cut": dict(grid=(61, 3), cell_size=4, rank=2, learned=(3,), head_dim=3),
    "start value": dict(grid=(37, 20), cell_size=4, rank=4, learned=()),
    "more levels learned than used": dict(grid=(13, 18), cell_size=4, rank=4, learned=(3,)),
    "cells of 6, three weights a cell": dict(grid=(13, 37), cell_size=6, rank=3),
    "cells of 24": dict(grid=(100, 5), cell_size=24, rank=2, head_dim=3),
    "one axis": dict(grid=(70,), cell_size=8, rank=8, learned=(2,), batch=2, head_dim=3),
    "bfloat16, 24 channels": dict(grid=(32, 18), cell_size=4, rank=4, dtype=torch.bfloat16, head_dim=24),
    "shared by the heads": dict(grid=(19, 18), cell_size=4, rank=4, heads=2, share_heads=True),
}


SLOW = {"cells of 24"}  # minutes in the interpreter


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=name, marks=pytest.mark.slow if name in SLOW else ()) for name, case in CASES.items()],
)
def test_results_are_those_of_the_torch_backend(case):
    check(**case)


@pytest.mark.parametrize("grid", [(24, 8), (17, 9)], ids=["whole", "cut"])
def test_small_tiles_and_many_runs_give_the_same(grid, monkeypatch):
    """Tiles of a cell each, a few columns at once, and sums over cells in many runs."""
    monkeypatch.setattr(tiles, "INTERPRETER", dict.fromkeys(tiles.INTERPRETER, tiles.Tile(16, 4, 1)))
    for name, value in (("MAX_COLUMNS", 4), ("PROGRAMS", 100)):
        monkeypatch.setattr(aggregation, name, value)
    backend._plan.cache_clear()
    check(grid=grid, cell_size=8, rank=3, head_dim=3)
    backend._plan.cache_clear()


def test_kernels_without_weight():
    """A summary whose kernel has no weight on what exists is 0, and so are its gradients."""
    call = moved(a_call((10, 10), 4, 4, head_dim=2))
    call.kernels[0][..., :2] = 0  # of the cells cut after 2 tokens nothing is left
    plan = backend._plan(backend._signature(call)).aggregation
    with torch.no_grad():
        kept = plan.forward(call, learn=True)
        found = plan.backward(call, kept, torch.ones_like(kept.lattices))
    assert (kept.lattices.unflatten(2, (6, 6))[:, :, 4:, 4:] == 0).all()
    assert all(x.isfinite().all() for x in (kept.lattices, found[0], *found[1]))
