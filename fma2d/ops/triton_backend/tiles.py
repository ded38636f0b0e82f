"""How every Triton kernel is tiled: the one table, and what to do where its choice does not fit.

A choice goes by kernel, tier of architecture, head_dim and dtype. Nothing is tuned at run time.
`benchmarks/gpu/tune_tiles.py` measures on a GPU and saves what it finds to `tuned_path()`, which goes before the table
from then on.
"""

import json
import os
import re
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
LEAST_TRITON = (3, 3)  # older ones take no tuples of strides
MOST_HEAD_DIM = 128


@dataclass(frozen=True)
class Tile:
    """How a kernel is compiled.

    Attributes:
        block: size of a tile at most, in the kernel's own measure: tokens a side of a product for attention, elements
            of the largest array for aggregation.
        step: tokens on the other side of the product, met at a time; None: as many as `block`.
    """

    block: int
    num_warps: int
    num_stages: int
    step: int | None = None


_HALF, _SINGLE = (torch.float16, torch.bfloat16), (torch.float32,)
_ALL = (*_HALF, *_SINGLE)


@dataclass(frozen=True)
class Rule:
    """A tile and where it is used: up to a head_dim, for some dtypes, on some tiers (all if none is named)."""

    head_dim: int
    dtypes: tuple[torch.dtype, ...]
    tile: Tile
    tiers: tuple[str, ...] = tuple(SHARED_MEMORY)


_QUERIES = (
    Rule(32, _HALF, Tile(64, 4, 2)),
    Rule(64, _HALF, Tile(64, 4, 3), ("sm_90",)),
    Rule(128, _HALF, Tile(64, 4, 2, step=32)),
    Rule(64, _SINGLE, Tile(32, 4, 2)),
    Rule(128, _SINGLE, Tile(32, 8, 1, step=16)),
)
_PARENTS = (Rule(64, _ALL, Tile(16, 1, 2)), Rule(128, _ALL, Tile(16, 2, 1)))
_LATTICES = (Rule(64, _ALL, Tile(32, 1, 2)), Rule(128, _ALL, Tile(32, 2, 2)))
_AGGREGATION = (Rule(128, _ALL, Tile(4096, 4, 1)),)
_ROWS = (Rule(128, _ALL, Tile(1, 1, 1)),)  # their tile follows from the shapes
# For each kernel its rules; the first that fits counts. In the main configurations none spills registers.
TABLE: dict[str, tuple[Rule, ...]] = {
    "near_forward": _QUERIES,
    "near_dq": _QUERIES,
    "near_dkdv": (
        Rule(64, _HALF, Tile(64, 4, 2, step=32)),
        Rule(128, _HALF, Tile(64, 8, 2, step=32)),
        Rule(128, _SINGLE, Tile(32, 8, 1, step=16)),
    ),
    "prepare": (Rule(128, _HALF, Tile(64, 4, 1)), Rule(128, _SINGLE, Tile(32, 4, 1))),
    "column_dkdv": (Rule(128, _HALF, Tile(16, 4, 2, step=32)), Rule(128, _SINGLE, Tile(16, 4, 1, step=32))),
    **dict.fromkeys(("coarse_forward", "coarse_dq", "coarse_dkdv", "column_sum"), _PARENTS),
    "merge_levels": _LATTICES,
    "collect": (Rule(128, _ALL, Tile(32, 4, 1)),),
    **dict.fromkeys(("summarise", "source_gradient"), _AGGREGATION),
    "product_gradient": (Rule(32, _ALL, Tile(1024, 1, 1)), Rule(128, _ALL, Tile(2048, 1, 1))),
    **dict.fromkeys(("lay_out", "kernel_gradient"), _ROWS),
}
AGGREGATION = ("summarise", "source_gradient", "product_gradient")
# The interpreter runs one program after the other, each step an array operation: few large tiles.
INTERPRETER = dict.fromkeys(AGGREGATION, Tile(1 << 13, 4, 1))


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


def version(text: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(map(int, re.findall(r"\d+", text)[:2]))


def why_not(capability: tuple[int, int] | None) -> str | None:
    """Why no kernel runs here on a device of this compute capability (None: the interpreter); None if they do."""
    import triton

    if torch.version.hip:
        return "the Triton kernels are made for NVIDIA GPUs, this PyTorch is one for AMD's"
    if version(triton.__version__) < LEAST_TRITON:
        least = ".".join(map(str, LEAST_TRITON))
        return f"the kernels need Triton {least} or newer (PyTorch 2.7 brings it), this is Triton {triton.__version__}"
    if capability is None or capability >= LEAST_CAPABILITY:
        return None
    least, has = (".".join(map(str, c)) for c in (LEAST_CAPABILITY, capability))
    return f"the Triton kernels need a GPU of compute capability {least} or newer (Ampere), this one has {has}"


def choose(kernel: str, capability: tuple[int, int], head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile of a kernel: what was tuned, else the table's.

    Raises:
        ValueError: for a capability, head_dim or dtype that the kernels do not cover.
    """
    family = tier(capability)
    if found := _tuned().get(_key(kernel, family, head_dim, dtype)):
        return found
    fits = [r.tile for r in TABLE[kernel] if head_dim <= r.head_dim and dtype in r.dtypes and family in r.tiers]
    if not fits:
        raise ValueError(f"{kernel} has no tile for head_dim {head_dim} and {dtype}: 1 to 128, 16- or 32-bit floats")
    return fits[0]


def smaller(kernel: str, tile: Tile) -> Tile | None:
    """The next tile to try where one needs too much: without stages, then with half the block; None after the last."""
    if tile.num_stages > 1:
        return replace(tile, num_stages=1)
    least = 512 if kernel in AGGREGATION else 16  # the sides of a product of matrices are at least 16
    if tile.block // 2 < least:
        return None
    return replace(tile, block=tile.block // 2, step=tile.step and max(16, tile.step // 2))


class NoTileFits(RuntimeError):
    """No tile of a kernel fits the device."""


# What fitted in place of a choice that did not: (kernel, device, head_dim, dtype, choice).
_fitting: dict[tuple, Tile] = {}


def choice(kernel: str, device: torch.device, head_dim: int, dtype: torch.dtype) -> Tile:
    """The tile of a kernel on a device, or the interpreter's."""
    if device.type != "cuda" and kernel in INTERPRETER:
        return INTERPRETER[kernel]
    return choose(kernel, _capability(device), head_dim, dtype)


class Launch:
    """A kernel with all that it takes but its tensors, which are its first parameters.

    The first call compiles it, with the next smaller tile where the device lacks the resources. Calls after it go to
    the compiled kernel with bound arguments, which takes a fifth of the time: so the tensors of all calls must be alike
    in dtype, in which of them are None and in alignment to 16 bytes.

    Args:
        bound: for a tile, the number of programs, the other arguments by name (among others) and the warps.
    """

    def __init__(
        self,
        kernel,
        device: torch.device,
        head_dim: int,
        dtype: torch.dtype,
        bound: Callable[[Tile], tuple[int, dict, int]],
    ):
        self._kernel, self._bound = kernel, bound
        self._where = (kernel.__name__, device, head_dim, dtype)
        self._run: Callable | None = None
        self._rest: tuple = ()

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        """Launch it.

        Raises:
            NoTileFits: if even the smallest tile needs too much.
        """
        if self._run is not None:
            self._run(*tensors, *self._rest)
        else:
            self._compile(tensors)

    def _compile(self, tensors: tuple) -> None:
        from triton.runtime.errors import OutOfResources

        chosen = choice(*self._where)
        key = (*self._where, chosen)
        tile = _fitting.get(key, chosen)
        while tile is not None:
            programs, named, warps = self._bound(tile)
            rest = tuple(named[name] for name in self._kernel.arg_names[len(tensors) :])
            try:
                # None in the interpreter, which has nothing to keep.
                compiled = self._kernel[(programs,)](*tensors, *rest, num_warps=warps, num_stages=tile.num_stages)
            except OutOfResources as error:
                reason = str(error)
                tile = smaller(self._where[0], tile)
            else:
                _fitting[key] = tile
                if compiled is not None:
                    self._rest, self._run = rest, compiled[(programs, 1, 1)]
                return
        kernel, device, head_dim, _ = self._where
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
        found = json.loads(path.read_text())
        return {key: Tile(*map(int, tile[:3]), tile[3] and int(tile[3])) for key, tile in found.items()}
    except (ValueError, TypeError, AttributeError, IndexError) as error:
        warnings.warn(f"{path} is not a file of tuned tiles and is ignored ({error}); delete it", stacklevel=2)
        return {}
