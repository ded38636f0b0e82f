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
        assert tile.block >= 1 and tile.num_warps in (1, 2, 4, 8) and tile.num_stages >= 1
    with pytest.raises(ValueError, match="head_dim 256"):
        tiles.choose("near_forward", (9, 0), 256, torch.float16)


def test_old_devices_are_refused_with_a_reason():
    assert tiles.why_not((8, 0)) is None
    reason = tiles.why_not((7, 5))
    assert "8.0" in reason and "7.5" in reason
    with pytest.raises(ValueError, match=r"7\.5"):
        tiles.choose("near_forward", (7, 5), 64, torch.float16)


def test_old_versions_of_triton_are_refused_by_name(monkeypatch):
    """Those that PyTorch 2.4 to 2.6 bring cannot take tuples of strides."""
    for version, refused in (("3.2.0", True), ("3.0.0+git1", True), ("3.3.1", False), ("3.10.0", False)):
        monkeypatch.setattr("triton.__version__", version)
        reason = tiles.why_not((9, 0))
        assert (reason is not None) == refused
        assert not refused or ("3.3" in reason and version in reason)


def test_other_makes_are_refused_with_a_reason(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert "NVIDIA" in tiles.why_not((9, 4))


class Kernel:
    """Compiles for tiles of at most `limit` elements times stages; notes what is compiled and what is run."""

    __name__, arg_names = "near_forward", ["x", "BLOCK"]

    def __init__(self, limit):
        self.limit, self.compiled, self.ran = limit, [], []

    def __getitem__(self, grid):
        def launch(x, block, num_warps, num_stages):
            self.compiled.append((block, num_stages))
            if block * num_stages > self.limit:
                raise errors.OutOfResources(block, self.limit, "shared memory")
            return {(grid[0], 1, 1): lambda *arguments: self.ran.append(arguments)}

        return launch

    def launch(self):
        return tiles.Launch(self, GPU, 64, torch.bfloat16, lambda tile: (7, dict(BLOCK=tile.block), tile.num_warps))


def test_steps_down_to_what_fits_and_remembers_it():
    kernel = Kernel(32)
    kernel.launch()("x")
    first = tiles.choose(*KEY)
    assert kernel.compiled == [(first.block, first.num_stages), (64, 1), (32, 1)]
    assert tiles.smaller("near_dq", tiles.Tile(32, 4, 1, step=32)) == tiles.Tile(16, 4, 1, step=16)
    del kernel.compiled[:]
    kernel.launch()("x")
    assert kernel.compiled == [(32, 1)]


def test_what_is_compiled_is_called_from_then_on_with_its_arguments():
    kernel = Kernel(1000)
    launch = kernel.launch()
    for x in "abc":
        launch(x)
    assert len(kernel.compiled) == 1 and kernel.ran == [("b", 64), ("c", 64)]


def test_nothing_fits_so_torch_is_used_with_one_warning(recwarn):
    def triton_step():
        return Kernel(8).launch()("x")

    with pytest.raises(tiles.NoTileFits, match="near_forward does not fit some GPU at head_dim 64: out of resource"):
        triton_step()
    for _ in range(2):
        assert tiles.run_or(triton_step, lambda: "torch") == "torch"
    [warning] = recwarn
    assert "plain PyTorch is used instead" in str(warning.message)


def test_other_errors_are_not_hidden():
    def step():
        raise RuntimeError("an illegal memory access")

    with pytest.raises(RuntimeError, match="illegal"):
        tiles.run_or(step, lambda: None)


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
