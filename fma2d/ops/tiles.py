"""How every Triton kernel is tiled: the one table, and what to do where its choice does not fit.

A choice goes by kernel, tier of architecture, head_dim and dtype. Nothing is tuned at run time. `tools/tune_tiles.py`
measures on a GPU and saves what it finds to `tuned_path()`, which goes before the table from then on.
"""

import json
import os
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import TypeVar

import torch

Result = TypeVar("Result")

# Shared memory that a program may have, in bytes. A tier is named after its first architecture.
SHARED_MEMORY = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10}
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Tile:
    """How a kernel is compiled.

    Attributes:
        block: size of a tile at most, in the kernel's own measure: tokens a side of a product for attention, elements
            of the largest array for aggregation.
    """

    block: int
    num_warps: int
    num_stages: int


# For every kernel its tile, and the smallest block worth a try.
_ATTENTION, _AGGREGATION = (Tile(64, 4, 2), 16), (Tile(4096, 4, 2), 512)
TABLE = {
    "near_forward": _ATTENTION,
    "coarse_forward": _ATTENTION,
    "merge_levels": _ATTENTION,
    "prepare": _ATTENTION,
    "collect": _ATTENTION,
    "coarse_dq": _ATTENTION,
    "coarse_dkdv": _ATTENTION,
    "column_dkdv": _ATTENTION,
    "column_sum": _ATTENTION,
    "near_dq": _ATTENTION,
    "near_dkdv": _ATTENTION,
    "summarise_kernel": _AGGREGATION,
    "source_gradient_kernel": _AGGREGATION,
    "weight_gradient_kernel": (Tile(2048, 4, 2), 512),
}
# Where a kernel needs another tile: (kernel, tier, head_dim up to, dtype).
EXCEPTIONS: dict[tuple[str, str, int, torch.dtype], Tile] = {}
# The interpreter runs one program after the other, each step an array operation: few large tiles.
INTERPRETER = {
    kernel: Tile(1 << 16, 4, 1) for kernel in ("summarise_kernel", "source_gradient_kernel", "weight_gradient_kernel")
}


def tier(capability: tuple[int, int]) -> str:
    """The tier of a compute capability.

    Raises:
        ValueError: for one below `LEAST_CAPABILITY`.
    """
    if capability < LEAST_CAPABILITY:
        raise ValueError(why_not(capability))
    if capability in ((8, 0), (8, 7)):
        return "sm_80"
    return "sm_90" if capability[0] in (9, 10, 11) else "sm_86"


def why_not(capability: tuple[int, int]) -> str | None:
    """Why no kernel runs on a device of this compute capability; None if they do."""
    if capability >= LEAST_CAPABILITY:
        return None
    least, has = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, capability))
    return f"the Triton kernels need a GPU of compute capability {least} or newer (Ampere), this one has {has}"


def choose(kernel: str, capability: tuple[int, int], head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile of a kernel: what was tuned, else the table's."""
    family = tier(capability)
    if found := _tuned().get(_key(kernel, family, head_dim, dtype)):
        return found
    limits = [n for name, t, n, d in EXCEPTIONS if (name, t, d) == (kernel, family, dtype) and n >= head_dim]
    return EXCEPTIONS[kernel, family, min(limits), dtype] if limits else TABLE[kernel][0]


def smaller(kernel: str, tile: Tile) -> Tile | None:
    """The next tile to try where one needs too much: without stages, then with half the block; None after the last."""
    if tile.num_stages > 1:
        return replace(tile, num_stages=1)
    if tile.block // 2 < TABLE[kernel][1]:
        return None
    return replace(tile, block=tile.block // 2)


class NoTileFits(RuntimeError):
    """No tile of a kernel fits the device."""


# What fitted in place of a choice that did not: (kernel, device, head_dim, dtype, choice).
_fitting: dict[tuple, Tile] = {}


def launch(
    kernel: str, device: torch.device, head_dim: int, dtype: torch.dtype, run: Callable[[Tile], Result]
) -> Result:
    """`run` with the kernel's tile, or with the next smaller one that the device has the resources for.

    Raises:
        NoTileFits: if even the smallest needs too much.
    """
    from triton.runtime.errors import OutOfResources

    if device.type != "cuda" and kernel in INTERPRETER:
        return run(INTERPRETER[kernel])
    choice = choose(kernel, _capability(device), head_dim, dtype)
    key = (kernel, device, head_dim, dtype, choice)
    tile = _fitting.get(key, choice)
    while tile is not None:
        try:
            result = run(tile)
        except OutOfResources as error:
            reason = str(error)
            tile = smaller(kernel, tile)
        else:
            _fitting[key] = tile
            return result
    raise NoTileFits(f"{kernel} does not fit {torch.cuda.get_device_name(device)} at head_dim {head_dim}: {reason}")


def run_or(step: Callable[[], Result], other: Callable[[], Result]) -> Result:
    """`step`, or with one warning `other` where no tile of a kernel fits; nothing of `step` must last then."""
    try:
        return step()
    except NoTileFits as error:
        _warn(f"{error}; plain PyTorch is used instead")
        return other()


@cache
def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=3)


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    """A device's compute capability; the interpreter stands for the least."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else LEAST_CAPABILITY


def tuned_path() -> Path:
    """The file of tuned tiles, in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fma2d" / "tiles.json"


def save_tuned(tiles: dict[tuple[str, tuple[int, int], int, torch.dtype], Tile]) -> Path:
    """Add tiles, by the arguments of `choose`, to the file of tuned ones; used from now on."""
    path, found = tuned_path(), dict(_tuned())
    found |= {_key(kernel, tier(capability), *rest): tile for (kernel, capability, *rest), tile in tiles.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({key: astuple(tile) for key, tile in sorted(found.items())}, indent=1) + "\n")
    _tuned.cache_clear()
    return path


def _key(kernel: str, tier: str, head_dim: int, dtype: torch.dtype) -> str:
    return f"{kernel} {tier} {head_dim} {str(dtype).removeprefix('torch.')}"


@cache
def _tuned() -> dict[str, Tile]:
    path = tuned_path()
    if not path.exists():
        return {}
    try:
        return {key: Tile(*map(int, tile)) for key, tile in json.loads(path.read_text()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        warnings.warn(f"{path} is not a file of tuned tiles and is ignored ({error}); delete it", stacklevel=2)
        return {}
