"""What a call of the operator asks for, checked; the same for every backend."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

Kernels = Sequence[Sequence[Tensor]]  # over levels, then axes: `[rank, heads | 1, head_dim | 1, bins]`


@dataclass(frozen=True)
class Options:
    """Settings of one call.

    Attributes:
        cell_size: tokens per side of a base cell.
        rank: summary tokens per coarse cell.
        causal: a token sees only what is not to its right (1D).
        count_bias: add `log n` to a summary token's score.
        scale: factor of every score.
    """

    cell_size: int
    rank: int
    causal: bool
    count_bias: bool
    scale: float


class Call(NamedTuple):
    """What a backend's `forward` and `backward` get.

    Attributes:
        q, k, v: `[B, heads, *grid, head_dim]`.
        query_kernels: None in the log-linear variant.
        key_mask: bool `[B, *grid]`, True where a token exists.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    key_kernels: Kernels
    value_kernels: Kernels
    query_kernels: Kernels | None
    key_mask: Tensor | None
    options: Options
