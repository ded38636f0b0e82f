"""Draws the covers of the documentation: `python -m research.draw_covers` writes docs/figures/."""

from pathlib import Path

from matplotlib.figure import Figure

from fma2d import num_levels
from fma2d.visualize import draw_cover

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "figures"


def in_a_row(name, panels):
    """Covers side by side; a panel is (title, grid, cell size, token)."""
    figure = Figure(figsize=(5.4 * len(panels), 7.4), layout="constrained")
    for axes, (title, grid, cell_size, token) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        draw_cover(grid, cell_size, token, ax=axes)
        axes.set_title(title)
    save(figure, name)


def strips(name, tokens, cell_size, token):
    """A sequence's cover, both ways and causal, one below the other."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    for axes, causal in zip(figure.subplots(2, 1), (False, True), strict=True):
        draw_cover((tokens,), cell_size, (token,), causal=causal, ax=axes)
        axes.set_title(f"{'causal' if causal else 'both ways'}: {tokens} tokens, cell size {cell_size}")
    save(figure, name)


def save(figure, name):
    """Write a PNG and say so."""
    figure.savefig(FOLDER / name, dpi=80, bbox_inches="tight")
    print(FOLDER / name)


if __name__ == "__main__":
    in_a_row(
        "cover_grid.png",
        [
            ("64 x 64 tokens, a token in the middle", (64, 64), 8, (29, 35)),
            ("the same grid, a token in the corner", (64, 64), 8, (1, 2)),
        ],
    )
    in_a_row(
        "cover_ragged.png",
        [
            ("45 x 70 tokens: cells at the edges are cut", (45, 70), 8, (20, 61)),
            ("29 x 100 tokens: as many levels as the longer side asks for", (29, 100), 8, (11, 20)),
        ],
    )
    in_a_row(
        "cover_cells.png",
        [(f"cell size {r}, levels: {num_levels((64, 64), r)}", (64, 64), r, (29, 35)) for r in (4, 8, 16)],
    )
    strips("cover_sequence.png", 256, 8, 131)
