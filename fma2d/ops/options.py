"""What a call of the operator asks for, checked; the same for every backend."""

from dataclasses import dataclass


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
