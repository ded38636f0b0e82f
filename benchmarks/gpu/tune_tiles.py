"""Measures tiles on this machine's GPU and saves the best, which are used from then on; see --help.

One kernel after the other is tried with other blocks and steps, then with other warps and stages, and the whole
operator, forward and backward, is timed; a tile has to be faster than the table's by more than the noise. Results go to
the file that this prints; delete it to return to the table.
"""

import argparse
import sys
from dataclasses import astuple, replace
from itertools import product
from pathlib import Path
from statistics import median
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from tqdm import tqdm
from triton.runtime.errors import OutOfResources

from benchmarks.operator_benchmark import build
from fma2d.ops import triton_backend
from fma2d.ops.triton_backend import tiles

GAIN = 0.02  # the least share of time that another tile has to save
REPEATS = 30
LEAST_STEP = 16  # the sides of a product of matrices are at least 16
# What is varied together; every kernel's shape first, then how it is compiled.
TOGETHER = (("block", "step"), ("num_warps", "num_stages"))


def seconds(step) -> float:
    """The median time of a call, after two that compile and warm up; plans keep the tiles that they were made with."""
    triton_backend._plan.cache_clear()
    times = []
    for _ in range(REPEATS + 2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return median(times[2:])


def candidates(kernel: str, tile: tiles.Tile, names: tuple[str, ...]) -> list[tiles.Tile]:
    """The tile's neighbours in the attributes of these names."""
    block, step = tile.block, tile.step or tile.block
    near = dict(block=(block // 2, block, block * 2), num_warps=(2, 4, 8), num_stages=(1, 2, 3, 4), step=(None,))
    if any(rule.tile.step for rule in tiles.TABLE[kernel]):  # the kernel has one
        near["step"] = tuple(n for n in (step // 2, step, step * 2) if n >= LEAST_STEP)
    found = [replace(tile, **dict(zip(names, values, strict=True))) for values in product(*(near[n] for n in names))]
    return [other for other in found if other != tile]


def tune(head_dim: int, dtype: torch.dtype, variant: str, side: int, batch: int) -> dict:
    """The tiles that beat the table's, by the arguments of `tiles.choose`."""
    subject = dict(benchmark="operator", name="fma2d-triton", mode="forward+backward", variant=variant)
    shape = dict(height=side, width=side, batch=batch, heads=2, head_dim=head_dim)
    step = build(**subject, **shape, device="cuda", dtype=str(dtype).removeprefix("torch.")).step
    found, launched = {}, {}
    choose = tiles.choose

    def chosen(*key):
        launched[key] = None
        return found.get(key) or choose(*key)

    with patch.object(tiles, "choose", chosen):
        best = seconds(step)
        for key, names in (bar := tqdm(list(product(launched, TOGETHER)), unit="turn")):
            for tile in candidates(key[0], chosen(*key), names):
                bar.set_description(f"{key[0]} {astuple(tile)}, best {1e3 * best:.3f} ms")
                before, found[key] = found.get(key), tile
                try:
                    time = seconds(step)
                except (OutOfResources, tiles.NoTileFits):
                    time = float("inf")
                if time < best * (1 - GAIN):
                    best = time
                elif before is None:
                    del found[key]
                else:
                    found[key] = before
    return found


def main(argv: list[str] | None = None) -> int:
    """Tune and save; 2 where there is no GPU that the kernels run on."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--head-dim", nargs="+", type=int, default=[64], help="(64)")
    add("--dtype", nargs="+", choices=("bfloat16", "float16", "float32"), default=["bfloat16"], help="(bfloat16)")
    add("--variant", choices=("linear", "loglinear"), default="linear", help="(linear)")
    add("--side", type=int, default=256, help="tokens a side of the grid that is timed (256)")
    add("--batch", type=int, default=8, help="(8)")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("tuning measures on a GPU, and torch finds none here")
    if reason := tiles.why_not(torch.cuda.get_device_capability()):
        parser.error(reason)
    for head_dim, dtype in product(args.head_dim, args.dtype):
        found = tune(head_dim, getattr(torch, dtype), args.variant, args.side, args.batch)
        for (kernel, *_), tile in found.items():
            print(f"{kernel}, head_dim {head_dim}, {dtype}: {tile}")
        print(f"{len(found)} tiles better than the table's, saved in {tiles.save_tuned(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
