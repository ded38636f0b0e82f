"""The table of tiles, what happens where a tile does not fit, and what was tuned."""

from dataclasses import astuple
from itertools import product
from types import SimpleNamespace

import pytest
import torch

errors = pytest.importorskip("triton.runtime.errors")
tiles = pytest.importorskip("fma2d.ops.triton_backend.tiles")
GPU = torch.device("cuda", 0)
KEY = ("near_forward", (9, 0), 64, torch.bfloat16)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    """No tuned tiles, nothing learned, and a GPU that is asked for no properties."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiles, "_fitting", {})
    monkeypatch.setattr(tiles, "_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "some GPU")
    tiles._tuned.cache_clear()
    tiles._warn.cache_clear()
    yield
    tiles._tuned.cache_clear()


def test_every_kernel_has_a_tile_everywhere():
    capabilities = [(8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)]
    tiers = [tiles.tier(c) for c in capabilities]
    assert tiers == ["sm_80", "sm_86", "sm_80", "sm_86", "sm_90", "sm_90", "sm_90", "sm_86", "sm_86"]
    dtypes = (torch.float16, torch.bfloat16, torch.float32)
    for kernel, capability, head_dim, dtype in product(tiles.TABLE, capabilities, (1, 8, 24, 64, 128), dtypes):
        tile = tiles.choose(kernel, capability, head_dim, dtype)
        assert tile.block >= 16 and tile.num_warps in (1, 2, 4, 8) and tile.num_stages >= 1
    with pytest.raises(ValueError, match="head_dim 256"):
        tiles.choose("near_forward", (9, 0), 256, torch.float16)


def test_old_devices_are_refused_with_a_reason():
    assert tiles.why_not((8, 0)) is None
    reason = tiles.why_not((7, 5))
    assert "8.0" in reason and "7.5" in reason
    with pytest.raises(ValueError, match=r"7\.5"):
        tiles.choose("near_forward", (7, 5), 64, torch.float16)


def test_other_makes_are_refused_with_a_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in tiles.why_not((9, 4))


def run_with(limit, tried):
    def run(tile):
        tried.append(tile)
        if tile.block * tile.num_stages > limit:
            raise errors.OutOfResources(tile.block, limit, "shared memory")
        return tile

    return run


def test_steps_down_to_what_fits_and_remembers_it():
    tried = []
    first = tiles.choose(*KEY)
    found = tiles.launch("near_forward", GPU, 64, torch.bfloat16, run_with(32, tried))
    assert tried == [first, tiles.Tile(64, 4, 1), tiles.Tile(32, 4, 1)] and found == tried[-1]
    assert tiles.smaller("near_dq", tiles.Tile(32, 4, 1, step=32)) == tiles.Tile(16, 4, 1, step=16)
    del tried[:]
    assert tiles.launch("near_forward", GPU, 64, torch.bfloat16, run_with(32, tried)) == found
    assert tried == [found]


def test_nothing_fits_so_torch_is_used_with_one_warning(recwarn):
    def triton_step():
        return tiles.launch("near_dq", GPU, 64, torch.bfloat16, run_with(8, []))

    with pytest.raises(tiles.NoTileFits, match="near_dq does not fit some GPU at head_dim 64: out of resource"):
        triton_step()
    for _ in range(2):
        assert tiles.run_or(triton_step, lambda: "torch") == "torch"
    [warning] = recwarn
    assert "plain PyTorch is used instead" in str(warning.message)


def test_other_errors_are_not_hidden():
    def run(tile):
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        tiles.run_or(lambda: tiles.launch("near_dq", GPU, 64, torch.bfloat16, run), lambda: None)


def test_tuned_tiles_go_before_the_table():
    path = tiles.save_tuned({KEY: tiles.Tile(32, 2, 1)})
    tiles.save_tuned({("near_dq", *KEY[1:]): tiles.Tile(16, 2, 1, step=32)})
    assert tiles.choose(*KEY) == tiles.Tile(32, 2, 1) and path == tiles.tuned_path()
    assert tiles.choose("near_dq", *KEY[1:]) == tiles.Tile(16, 2, 1, step=32)
    assert tiles.choose(KEY[0], (8, 0), *KEY[2:]) != tiles.Tile(32, 2, 1)
    path.write_text("not json")
    tiles._tuned.cache_clear()
    with pytest.warns(UserWarning, match="delete it"):
        assert tiles.choose(*KEY) != tiles.Tile(32, 2, 1)


def test_the_tuner_finds_the_tile_that_is_faster(monkeypatch):
    """Blocks, steps, warps and stages: each of them is varied, where a kernel has it, of the kernels launched alone."""
    tune_tiles = pytest.importorskip("benchmarks.gpu.tune_tiles")
    best = {"near_dq": tiles.Tile(32, 8, 2, step=32), "coarse_dq": tiles.Tile(16, 4, 1)}
    tried = set()

    def seconds(step):
        found = {kernel: tiles.choose(kernel, *KEY[1:]) for kernel in best}
        tried.update(found.items())
        pairs = (zip(astuple(found[kernel]), astuple(best[kernel]), strict=True) for kernel in best)
        return 1 + sum(x != y for pair in pairs for x, y in pair)

    monkeypatch.setattr(tune_tiles, "build", lambda **_: SimpleNamespace(step=None))
    monkeypatch.setattr(tune_tiles, "seconds", seconds)
    found = tune_tiles.tune(64, torch.bfloat16, "linear", 256, 8)
    assert {key[0]: tile for key, tile in found.items()} == best
    assert all(tile.step is None for kernel, tile in tried if kernel == "coarse_dq")
    assert all(tile.step is None or tile.step >= 16 for _, tile in tried)
