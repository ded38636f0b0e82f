"""Checks of arguments: TypeError for another kind of value, ValueError for one out of range; both name the argument."""

from collections.abc import Sequence
from math import isfinite

# No tensor has a longer axis on every backend; and cells of level 32 are as long.
MOST = 2**31 - 1
MOST_LEVELS = 32


def check_integer(name: str, value, least: int, most: int = MOST) -> None:
    """An integer of Python's from `least` to `most`; a bool, a tensor and numpy's are none."""
    if not isinstance(value, int) or value is True or value is False:
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {value}")


def check_positive(name: str, value, most: int = MOST) -> None:
    """An integer from 1 to `most`."""
    check_integer(name, value, 1, most)


def check_integers(name: str, values) -> None:
    """A sequence of integers of any sign."""
    if not isinstance(values, Sequence) or not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}")


def check_bool(name: str, value) -> None:
    if value is not True and value is not False:
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_number(name: str, value, least: float, most: float | None = None) -> None:
    """A finite number of Python's from `least` to `most`."""
    if not isinstance(value, (int, float)) or value is True or value is False:
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (least <= value and (most is None or value <= most) and (abs(value) <= MOST or isfinite(value))):
        bounds = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} must be finite and {bounds}, got {value}")


def check_rate(name: str, value) -> None:
    """A probability."""
    check_number(name, value, 0, 1)


def check_choice(name: str, value, known: Sequence[str]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be one of {tuple(known)}, got {value!r}")
    if value not in known:
        raise ValueError(f"{name} must be one of {tuple(known)}, got {value!r}")


def check_dtype(dtype) -> None:
    """A float dtype, or None for torch's default."""
    if dtype is not None and not getattr(dtype, "is_floating_point", False):
        raise TypeError(f"dtype must be a float dtype, got {dtype!r}")
