"""A call of the operator: what it asks for, checked, the same for every backend."""

from collections.abc import Sequence
from functools import reduce
from sys import float_info
from typing import NamedTuple

from torch import Tensor, bfloat16, bool, float16, float32, float64, strided, sym_max

from ..geometry import cell_side, check_grid, check_positive, num_levels
from ..kernels import check_variant, num_kinds

DTYPES = (float16, bfloat16, float32, float64)
Kernels = Tensor | Sequence[Tensor]


class Options(NamedTuple):
    """Settings of one call.

    Attributes:
        cell_size: tokens per side of a base cell.
        rank: summary tokens per coarse cell.
        variant: "linear" or "loglinear".
        causal: a token sees only what is not to its right (1D).
        count_bias: add `log n` to a summary token's score.
        scale: factor of every score.
    """

    cell_size: int
    rank: int
    variant: str
    causal: bool
    count_bias: bool
    scale: float


class Call(NamedTuple):
    """What a backend's `forward` and `backward` get.

    Attributes:
        q, k, v: `[B, heads, *grid, head_dim]`.
        kernels: stacks `[levels, kinds, axes, rank, heads | 1, head_dim | 1, bins]`, see `fma2d.kernels`.
        key_mask: bool `[B, *grid]`, True where a token exists.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    kernels: list[Tensor]
    key_mask: Tensor | None
    options: Options

    @property
    def grid(self) -> tuple[int, ...]:
        return tuple(self.q.shape[2:-1])

    @property
    def levels(self) -> int:
        return num_levels(self.grid, self.options.cell_size)

    @property
    def dense(self) -> bool:
        """Whether there are no coarse levels; of sizes that a compiler leaves open, one condition."""
        sides = [int(n) if isinstance(n, Tensor) else n for n in self.q.shape[2:-1]]  # tensors, under a tracer
        return reduce(sym_max, sides) <= 2 * self.options.cell_size

    @property
    def linear(self) -> bool:
        return self.options.variant == "linear"


def check_call(
    q, k, v, kernels, key_mask, cell_size, rank, variant, causal, count_bias, scale, return_lse
) -> tuple[list[Tensor], Tensor | None]:
    """Check a call's arguments; return the kernels as stacks and the mask expanded to `[B, *grid]`.

    Raises:
        TypeError: for an argument of the wrong kind (a dtype that is no float type of the contract, say).
        ValueError: for one that does not fit the others.
    """
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
    if not 4 <= q.dim() <= 6:
        raise ValueError(f"q must be [B, heads, *grid, head_dim] with 1 to 3 grid axes, got shape {tuple(q.shape)}")
    for name, x in (("k", k), ("v", v)):
        if x.shape != q.shape:
            raise ValueError(
                f"{name} must have the shape of q {tuple(q.shape)} (grouped queries and cross-attention are not "
                f"supported), got {tuple(x.shape)}"
            )
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q, {q.dtype}, got {x.dtype}")
        _check_device(name, x, q)
    for name, value in (("cell_size", cell_size), ("rank", rank)):
        check_positive(name, value)
    grid = q.shape[2:-1]
    check_grid(grid, cell_size)
    if min(q.shape[1], q.shape[-1]) < 1:
        raise ValueError(f"q must have at least one head and one channel, got shape {tuple(q.shape)}")
    check_variant(variant)
    for name, value in (("causal", causal), ("count_bias", count_bias), ("return_lse", return_lse)):
        if value is not True and value is not False:
            raise TypeError(f"{name} must be True or False, got {value!r}")
    if causal and len(grid) != 1:
        raise ValueError(f"causal needs a grid of one axis, got {tuple(grid)}")
    if causal and variant == "linear":
        raise ValueError("causal needs variant 'loglinear': a summary query would hold later tokens")
    if scale is not None and (not isinstance(scale, (int, float)) or scale is True or scale is False):
        raise TypeError(f"scale must be a number or None, got {scale!r}")
    if scale is not None and not -float_info.max <= scale <= float_info.max:
        raise ValueError(f"scale must be finite, got {scale}")
    return _stacks(kernels, q, cell_size, rank, variant), _check_mask(key_mask, q)


def check_tensor(name: str, x) -> None:
    """Raise TypeError unless x is a dense float tensor of the contract."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.layout != strided or x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got {'a nested one' if x.is_nested else x.layout}")
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")


def _check_device(name: str, x: Tensor, q: Tensor) -> None:
    if x.device != q.device:
        raise ValueError(f"{name} must be on the device of q, {q.device}, got {x.device}")


def _stacks(kernels, q: Tensor, cell_size: int, rank: int, variant: str) -> list[Tensor]:
    if kernels is None:
        return []
    if not isinstance(kernels, (Tensor, list, tuple)):
        raise TypeError(
            "kernels must be None, a sequence of tensors, one a level, or a tensor with a levels axis in front, got "
            f"{type(kernels).__name__}"
        )
    stacks = [kernels] if isinstance(kernels, Tensor) else list(kernels)
    heads, head_dim, ndim, kinds = q.shape[1], q.shape[-1], q.dim() - 3, num_kinds(variant)
    level = 1
    for i, stack in enumerate(stacks):
        at = "kernels" if isinstance(kernels, Tensor) else f"kernels[{i}]"
        check_tensor(at, stack)
        _check_device(at, stack, q)
        if not isinstance(kernels, Tensor):
            stacks[i] = stack = stack[None]
        side = cell_side(level, cell_size)
        fits = (
            stack.dim() == 7
            and tuple(stack.shape[1:4]) == (kinds, ndim, rank)
            and (stack.shape[4] == 1 or stack.shape[4] == heads)
            and (stack.shape[5] == 1 or stack.shape[5] == head_dim)
            and stack.shape[6] > 0
            and side % stack.shape[6] == 0
        )
        if not fits:
            front = "levels, " if isinstance(kernels, Tensor) else ""
            got = stack.shape if isinstance(kernels, Tensor) else stack.shape[1:]
            raise ValueError(
                f"{at} must be [{front}kinds {kinds}, axes {ndim}, rank {rank}, heads {heads} or 1, head_dim "
                f"{head_dim} or 1, bins dividing the cell side {side}] in the {variant} variant, got {tuple(got)}"
            )
        level += len(stack)
    return [stack for stack in stacks if len(stack)]


def _check_mask(key_mask, q: Tensor) -> Tensor | None:
    if key_mask is None:
        return None
    dense = isinstance(key_mask, Tensor) and key_mask.layout == strided and not key_mask.is_nested
    if not dense or key_mask.dtype != bool:
        got = key_mask.dtype if isinstance(key_mask, Tensor) else type(key_mask).__name__
        raise TypeError(f"key_mask must be a dense bool tensor, True where the token exists, got {got}")
    _check_device("key_mask", key_mask, q)
    shape = (q.shape[0], *q.shape[2:-1])
    if key_mask.dim() > len(shape) or any(
        m != 1 and m != n for m, n in zip(reversed(key_mask.shape), reversed(shape), strict=False)
    ):
        raise ValueError(f"key_mask must be broadcastable to [B, *grid] = {shape}, got {tuple(key_mask.shape)}")
    return key_mask.expand(shape)
