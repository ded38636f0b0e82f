"""A call of the operator, as every backend gets it."""

from typing import NamedTuple

from torch import Tensor


class Options(NamedTuple):
    """Settings of one call."""

    cell_size: int
    rank: int
    variant: str
    causal: bool
    count_bias: bool
    scale: float


class Call(NamedTuple):
    """What a backend's `forward` and `backward` get; see the internal call."""

    q: Tensor
    k: Tensor
    v: Tensor
    kernels: list[Tensor]
    key_mask: Tensor | None
    options: Options
