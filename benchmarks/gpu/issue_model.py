"""How long the launches of the main shape take at the least, by the instructions that are issued and the bytes moved.

A multiprocessor issues one instruction of a warp a clock from each of its four schedulers; bytes are those of arrays
read or written once. Of both times the larger counts. Nothing here has been measured: waits for what was loaded, and
programs too few to fill the GPU, come on top.

The main shape: 256 x 256 tokens, 2 heads of 64, bfloat16, cell size 8, rank 4, one image.
"""

import re
from collections.abc import Sequence

# Of an H200: multiprocessors, schedulers of each, clocks a second; bytes a second, as measured on one.
ISSUED = 132 * 4 * 1.77e9
BYTES = 4.3e12

SIDE, CELL, LEVELS = 256, 8, 4
TOKENS = SIDE**2 * 128  # elements of q
CELLS = SIDE // CELL
# Parents of each level, a side.
PARENTS = [CELLS // 2 ** (level + 1) for level in range(LEVELS)]
MB = 1e6
TOKEN, BLOCKS = TOKENS * 2, TOKENS * 4 * (1 / 4 + 1 / 16)
LATTICE = TOKENS * 4 / 16 * (1 + 1 / 4 + 1 / 16 + 1 / 64)
FAR = TOKENS * 4 / 16


def _window(cells: int) -> float:
    """Cells around a cell that exist, itself among them, in the mean."""
    return ((3 * cells - 2) / cells) ** 2


_NEAR = _window(CELLS)
_COARSE = sum(n * n * _window(n) for n in PARENTS) / sum(n * n for n in PARENTS)
# A parent of level l is asked by all base cells of its window, cut into up to 64 pieces.
_PIECES = [min(4**level, 64) for level in range(LEVELS)]
_ASKED = sum(n * n * _window(n) * 4 ** (level + 1) for level, n in enumerate(PARENTS))
_ASKED /= sum(n * n * pieces for n, pieces in zip(PARENTS, _PIECES, strict=True))

# The longest loop of the log-linear near field is over far columns, four tiles a level; a turn of the near one is 0.3
# of one of those.
_COLUMNS = 4 * LEVELS + 0.3 * _NEAR


def _both(work: list) -> dict[str, list]:
    return {"linear": work, "loglinear": list(work)}


# By kernel, in the order of its launches: how often the main loop runs in a program, and bytes, of the linear variant
# and of the log-linear one. What is outside the main loop is taken to run once.
WORK: dict[str, dict[str, list[tuple[float, float]]]] = {
    "lay_out": _both([(0, MB)] * 2),
    "summarise": {
        # Rows four at a time; then two at a time of 8 units, of 16 at level 4 in two turns.
        "linear": [(2, 3 * (TOKEN + BLOCKS + FAR)), (4.2, 3 * (BLOCKS + FAR / 3))] * 2,
        "loglinear": [(2, 2 * (TOKEN + BLOCKS + FAR)), (4.2, 2 * (BLOCKS + FAR / 3))] * 2,
    },
    "coarse_forward": {"linear": [(_COARSE, 4 * LATTICE)] * 2},
    "merge_levels": {"linear": [(LEVELS, LATTICE + FAR)]},
    "near_forward": {"linear": [(_NEAR, 4 * TOKEN + FAR)], "loglinear": [(_COLUMNS, 4 * TOKEN)]},
    "prepare": {"linear": [(0, 2 * TOKEN + FAR)], "loglinear": [(0, 2 * TOKEN)]},
    "collect": {"linear": [(2, FAR + LATTICE)]},
    "coarse_dq": {"linear": [(_COARSE, 5 * LATTICE)]},
    "coarse_dkdv": {"linear": [(_COARSE, 6 * LATTICE)]},
    "column_dkdv": {"loglinear": [(2 * _ASKED, 3 * TOKEN)]},
    "column_sum": {"loglinear": [(8, 17 * MB)]},
    "source_gradient": {
        "linear": [(8, 3 * BLOCKS / 5), (4, 3 * BLOCKS), (4, 3 * (2 * TOKEN + BLOCKS))],
        "loglinear": [(8, 2 * BLOCKS / 5), (4, 2 * BLOCKS), (4, 2 * (2 * TOKEN + BLOCKS))],
    },
    "product_gradient": {
        "linear": [(1024 / 21, 3 * (TOKEN + FAR)), (21, 3 * (BLOCKS + FAR / 3))],
        "loglinear": [(1024 / 32, 2 * (TOKEN + FAR)), (21, 2 * (BLOCKS + FAR / 3))],
    },
    "kernel_gradient": _both([(32, 30 * MB)]),
    "near_dq": {"linear": [(_NEAR, 5 * TOKEN + 2 * TOKEN)], "loglinear": [(_COLUMNS, 5 * TOKEN)]},
    "near_dkdv": _both([(2 * _NEAR, 6 * TOKEN + 4 * TOKEN)]),
}


def instructions(sass: str) -> tuple[int, int]:
    """Of disassembled code and of its main loop, the longest without another inside (0 without one)."""
    places, jumps = [], []
    for line in sass.splitlines():
        if found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", line):
            place, text = int(found[1], 16), found[2]
            places.append(place)
            if (jump := re.search(r"\bBRA(?:\.\w+)* .*?0x([0-9a-f]+)", text)) and int(jump[1], 16) < place:
                jumps.append((int(jump[1], 16), place))
    inner = [(a, b) for a, b in jumps if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in jumps)]
    return len(places), max((sum(a <= place <= b for place in places) for a, b in inner), default=0)


def times(variant: str, calls: Sequence[tuple[str, int, object]]) -> list[dict]:
    """A line for each launch, then sums.

    Args:
        calls: kernel, programs, and its row of the report, in the order of launches: forward, then backward.
    """
    lines, seen = [], {}
    for kernel, programs, row in calls:
        turn = seen[kernel] = seen.get(kernel, -1) + 1
        trips, moved = WORK[kernel][variant][turn]
        of_warp = row.instructions + (trips - 1) * row.loop if trips else row.instructions
        issue, memory = 1e6 * programs * row.warps * of_warp / ISSUED, 1e6 * moved / BYTES
        in_forward = not any(line["kernel"] == "near_forward" for line in lines)
        line = dict(variant=variant, step="forward" if in_forward else "backward", kernel=kernel, programs=programs)
        line |= {"warps": row.warps, "instructions": row.instructions, "loop": row.loop, "trips": f"{trips:.1f}"}
        lines.append(line | dict(issue_us=f"{issue:.1f}", memory_us=f"{memory:.1f}", us=f"{max(issue, memory):.1f}"))

    def total(name: str, wanted) -> dict:
        parts = [line for line in lines if wanted(line)]
        sums = {key: f"{sum(float(line[key]) for line in parts):.1f}" for key in ("issue_us", "memory_us", "us")}
        return dict.fromkeys(lines[0], "") | dict(variant=variant, kernel=name) | sums

    far = ("coarse_forward", "merge_levels", "collect", "coarse_dq", "coarse_dkdv")
    sums = [
        total(f"all of the {step}", lambda line, step=step: line["step"] == step) for step in ("forward", "backward")
    ]
    if variant == "linear":
        sums.append(total("coarse far field, both", lambda line: line["kernel"] in far))
    return [*lines, *sums]
